"""Every error of the node in one tree, so that a caller can tell what may be tried again from what may not.

NodeError
├── ConfigError            config.yaml is wrong; start-up stops
├── SpoolError             a received object could not be kept
│   ├── SpoolFull          no space left: 0xA700, the sender tries again
│   └── BadIdentifier      a UID that is none: 0xA900
├── DerivationError        a derived object was not what it should be
├── WorkerDied             the compute child vanished: one attempt is lost, not the job
└── PeerError              see scu.py
"""


class NodeError(Exception):
    """Base of everything the node raises on purpose."""


class SpoolError(NodeError):
    """A received object could not be kept; it was not acknowledged."""


class SpoolFull(SpoolError):
    """The spool's file system has no space for the object."""


class BadIdentifier(SpoolError):
    """A UID that is no UID (PS3.5 section 9) and so can name no file."""


class WorkerDied(NodeError):
    """The compute child ended before its job did."""
