"""Floor 4: bindings. They attach to models that others define; no architecture is defined here."""

from kvloom.models.attention_interface import AttentionInterfaceBinding
from kvloom.models.binding import Binding, Regime
from kvloom.models.callable import CallableBinding
from kvloom.models.operations import Operation

__all__ = ["AttentionInterfaceBinding", "Binding", "CallableBinding", "Operation", "Regime"]
