"""`kvloom plan`: its options, its tables and its picture."""
