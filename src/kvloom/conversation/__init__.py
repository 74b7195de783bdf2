"""A conversation: turns on one growing context."""

from kvloom.conversation.conversation import Conversation
from kvloom.conversation.turn import Turn

__all__ = ["Conversation", "Turn"]
