"""The section ``reception`` of the configuration; nobody from outside of this machine may send unless it names them."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from pydantic import Field, Strict, field_validator

from dicomnode.config_fields import AETitle, Count, Network, Seconds, StorageClass
from dicomnode.config_section import Section
from dicomnode.strict_yaml import Location


class Reception(Section):
    """Who may send to the node, how much, and how long it waits for them."""

    called_ae_titles: tuple[AETitle, ...] = ()
    """Titles that senders may call the node by; empty: its own only."""
    calling_ae_titles: tuple[AETitle, ...] = ()
    """Titles that senders may have; empty: any, which only callers from this machine may (`open_doors`)."""
    networks: tuple[Network, ...] = (ipaddress.IPv4Network("127.0.0.0/8"), ipaddress.IPv6Network("::1/128"))
    """Addresses that may connect at all."""
    sop_classes: tuple[StorageClass, ...] = ()
    """Storage SOP classes that are accepted, by UID or keyword (CTImageStorage); empty: every standard one."""
    max_associations: Count = 64
    max_associations_per_peer: Count = 32
    max_object_mb: Count = 1024
    min_free_mb: Annotated[int, Strict(), Field(ge=0)] = 1024
    """With less free space than this on the spool's disk objects are refused (0xA700)."""
    acse_timeout_s: Seconds = 30
    dimse_timeout_s: Seconds = 60
    network_timeout_s: Seconds = 60
    different_duplicate: Literal["keep", "refuse"] = "keep"
    """The same SOP Instance UID with other bytes: kept apart and acknowledged, or refused with 0x0111."""

    @field_validator("networks")
    @classmethod
    def _somebody_may_connect(cls, networks: tuple[Network, ...]) -> tuple[Network, ...]:
        if not networks:
            raise ValueError("nobody could connect; write at least one network")
        return networks

    def open_doors(self, address: str) -> list[tuple[Location, str]]:
        """What is wrong with who may come in from outside of this machine to a node that listens at `address`.

        By default nobody may, and nobody does without being named.
        """
        outside = ", ".join(str(network) for network in self.networks if not network.is_loopback)
        problems: list[tuple[Location, str]] = []
        if outside and not self.calling_ae_titles:
            reason = f"from {outside} only who is named may send; write the AE titles of the senders, e.g. [CT1, CT2]"
            problems.append((("reception", "calling_ae_titles"), reason))
        if outside and _is_loopback(address):
            reason = (
                f"{address} is this machine only, where nobody from {outside} (reception.networks) can call; "
                "write 0.0.0.0, or the address of a network card"
            )
            problems.append((("node", "address"), reason))
        return problems


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host.lower().rstrip(".") == "localhost"
