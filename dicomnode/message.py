"""A DIMSE message while it comes (PS3.7 section 6.3, PS3.8 annex E); no socket here."""

from __future__ import annotations

from dataclasses import dataclass, field

from dicomnode import pdu
from dicomnode.errors import MalformedPdu
from dicomnode.pdu import Element


@dataclass(slots=True)
class Message:
    """A command set and the data set that it announces."""

    context_id: int
    max_command_bytes: int
    command: bytearray = field(default_factory=bytearray)
    elements: dict[int, bytes] = field(default_factory=dict)
    """Of the command set; empty until it is whole."""
    data: bytearray = field(default_factory=bytearray)
    """Without a limit: whoever adds looks at its length."""

    @property
    def has_data(self) -> bool:
        """Does the command announce a data set?"""
        return pdu.read_us(self.elements, Element.DATA_SET_TYPE) != pdu.NO_DATA_SET

    def add(self, item: pdu.Pdv) -> bool:
        """Take the next piece; True if the message is whole.

        Raises
        ------
        MalformedPdu
            If the piece is none of this message, or its command set is too long or cannot be read.
        """
        if item.context_id != self.context_id:
            raise MalformedPdu("a message in more than one presentation context")
        if item.command == bool(self.elements):
            raise MalformedPdu("a data set before its command, or a command within a message")
        if item.command:
            self.command += item.data
            if len(self.command) > self.max_command_bytes:
                raise MalformedPdu(f"a command set of more than {self.max_command_bytes} bytes")
            if not item.last:
                return False
            self.elements = pdu.read_command_set(bytes(self.command))
            return not self.has_data
        self.data += item.data
        return item.last
