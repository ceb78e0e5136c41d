"""Every error of the node in one tree, so that a caller can tell what may be tried again from what may not.

NodeError
├── ConfigError            config.yaml is wrong, or names what cannot be loaded; start-up stops
├── SpoolError             a received object could not be kept
│   ├── SpoolFull          no space left: 0xA700, the sender tries again
│   └── BadIdentifier      a UID that is none: 0xA900
├── DerivationError        a derived object was not what it should be
├── WorkerDied             the compute child vanished: one attempt is lost, not the job
├── MalformedPdu           bytes that PS3.7 or PS3.8 does not allow
├── UnsendableFile         a file that no syntax of the peer can carry, or that is gone or damaged
├── UnreadableFile         a file that cannot be read now (no free descriptor, a failing disk): tried again
└── PeerError              sending stopped; what was not answered is sent again, unless `permanent`
    ├── PeerUnreachable    no connection
    ├── AssociationRejected  permanent or transient, as the peer says
    ├── TlsFailed          no TLS with it, or a certificate that is not accepted (permanent)
    ├── PeerAborted        A-ABORT, early release or closed connection
    ├── PeerTimedOut       no answer or no progress in time
    ├── ProtocolViolation  an answer that is none
    ├── VerificationFailed no C-ECHO there (permanent)
    └── NoStorageCommitment no Storage Commitment there (permanent)
"""

import errno
import os
import traceback

_FRAMES = 4
"""So many places tell where a fault is."""
_GROUND = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})
"""No space, nothing to be written to, no file handles, no memory, no processes."""


class NodeError(Exception):
    """Base of everything the node raises on purpose."""


class ConfigError(NodeError):
    """The configuration cannot be used; `problems` has one line for each thing that is wrong."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class SpoolError(NodeError):
    """A received object could not be kept; it was not acknowledged."""


class SpoolFull(SpoolError):
    """The spool's file system has no space for the object."""


class BadIdentifier(SpoolError):
    """A UID that is no UID (PS3.5 section 9) and so can name no file."""


class DerivationError(NodeError):
    """A derived object could not be made, or what was written is not what was meant; the original is untouched."""


class WorkerDied(NodeError):
    """The compute child ended before its job did."""


class MalformedPdu(NodeError):
    """Bytes from the network that PS3.7 or PS3.8 does not allow."""


class UnsendableFile(NodeError):
    """A file that cannot be sent as it stands or in any syntax the peer takes; nothing of it went out."""


class UnreadableFile(NodeError):
    """A file that this machine could not read now and perhaps can later; nothing of it went out."""


class PeerError(NodeError):
    """Nothing is known to have arrived since the last answer; the association is gone."""

    permanent = False
    """True if the same try would fail the same way until somebody changes a configuration."""


class PeerUnreachable(PeerError):
    """No TCP connection: unknown host, refused, or no reply in time."""


class AssociationRejected(PeerError):
    """A-ASSOCIATE-RJ; `result`, `source` and `reason` as in PS3.8 table 9-21."""

    def __init__(self, message: str, result: int, source: int, reason: int) -> None:
        super().__init__(message)
        self.result = result
        self.source = source
        self.reason = reason
        self.permanent = result == 1


class TlsFailed(PeerError):
    """One side does not accept the other's certificate, or they have no version or cipher in common."""

    permanent = True


class PeerAborted(PeerError):
    """The peer sent A-ABORT, released early or closed the connection."""


class PeerTimedOut(PeerError):
    """No answer, or no progress, within the configured time."""


class ProtocolViolation(PeerError):
    """The peer sent what the standard does not allow at this point."""


class VerificationFailed(PeerError):
    """The peer accepts associations but not C-ECHO, or answered it with a failure."""

    permanent = True


class NoStorageCommitment(PeerError):
    """The peer accepts associations but not the Storage Commitment Push Model."""

    permanent = True


def ground_gave_way(error: OSError) -> bool:
    """Whether it is the machine that has run out of something: the same may go well later, whoever asks for it."""
    return error.errno in _GROUND


def fault(error: BaseException) -> str:
    """What to log of an error that nobody foresaw: its type, and the way to it, the place where it was raised first.

    Not its words: those of a library may quote a header, and so a patient. But those of the system for its number.
    """
    way = " < ".join(
        f"{frame.name}:{frame.lineno}" for frame in reversed(traceback.extract_tb(error.__traceback__)[-_FRAMES:])
    )
    number = error.errno if isinstance(error, OSError) else None
    known = f" ({os.strerror(number)})" if number and number in errno.errorcode else ""
    return f"{type(error).__name__}{known} at {way}"
