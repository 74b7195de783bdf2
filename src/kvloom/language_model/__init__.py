"""What users hold: `LanguageModel`, and what its calls take and return.

`calls` makes requests of calls, `generations` results of finished requests; `extending`, `scoring`, `inspecting` and
`importing` are each the work behind one method. `model` comes on top, and is imported from there: `verify`, which it
calls, compares results.
"""
