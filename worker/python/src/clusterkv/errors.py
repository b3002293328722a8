"""Errors of the service as exceptions: one class for each thing that a caller may do about it.

Every exception carries the canonical ``code`` (a ``grpc.StatusCode`` name), the ``reason`` of its
ErrorInfo (``proto/README.md`` lists them) and the ``metadata`` that the message names.
"""

from __future__ import annotations

from collections.abc import Mapping


class ClusterKVError(Exception):
    """Any error of the service or of the way to it."""

    def __init__(self, message: str, *, code: str = "UNKNOWN", reason: str = "",
                 metadata: Mapping[str, str] | None = None):
        super().__init__(f"{reason or code}: {message}")
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata: dict[str, str] = dict(metadata or {})


class InvalidRequestError(ClusterKVError, ValueError):
    """A field is wrong; the message names it, what was expected and what came. Do not retry."""


class NotFoundError(ClusterKVError, KeyError):
    """No such sequence, attachment or session."""

    __str__ = Exception.__str__


class AlreadyExistsError(ClusterKVError):
    """The name is live, or tokens were put before with other bytes."""


class StaleHandleError(ClusterKVError):
    """The handle is of an earlier generation or server process: what it named is gone; prefill again."""


class NotReadyError(ClusterKVError):
    """The state does not allow the call yet: chunks are missing, or layers are still being clustered."""


class NotOwnerError(NotFoundError):
    """It is not here and belongs to another shard: ask there (metadata: ownerShard, ownerAddress)."""


class RefusedError(ClusterKVError, PermissionError):
    """Who the caller's certificate says it is may not call this."""

    __str__ = Exception.__str__


class AbortedError(ClusterKVError):
    """Released or evicted under way, or the residency is out of step: start the exchange anew."""


class CapacityError(ClusterKVError):
    """The arena or a named limit is full. Retry later or elsewhere."""


class UnavailableError(ClusterKVError):
    """The server cannot be reached or is draining."""


class DeadlineError(ClusterKVError, TimeoutError):
    """The deadline passed."""


class DataLossError(ClusterKVError):
    """A page is not what was sealed. Never sent; prefill again."""


class UnsupportedError(ClusterKVError, NotImplementedError):
    """This server, model or option is not supported."""


_BY_CODE: dict[str, type[ClusterKVError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "OUT_OF_RANGE": InvalidRequestError,
    "NOT_FOUND": NotFoundError,
    "ALREADY_EXISTS": AlreadyExistsError,
    "FAILED_PRECONDITION": NotReadyError,
    "ABORTED": AbortedError,
    "RESOURCE_EXHAUSTED": CapacityError,
    "UNAVAILABLE": UnavailableError,
    "DEADLINE_EXCEEDED": DeadlineError,
    "DATA_LOSS": DataLossError,
    "UNIMPLEMENTED": UnsupportedError,
    "PERMISSION_DENIED": RefusedError,
    "UNAUTHENTICATED": RefusedError,
}
_BY_REASON: dict[str, type[ClusterKVError]] = {
    "STALE_GENERATION": StaleHandleError,
    "STALE_BOOT_ID": StaleHandleError,
    "NOT_OWNER": NotOwnerError,
}

CODE_NAMES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
    "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED",
    "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED")


def make_error(code: int | str, reason: str, message: str,
               metadata: Mapping[str, str] | None = None) -> ClusterKVError:
    """The exception for a canonical code (number or name) and an ErrorInfo reason."""
    name = CODE_NAMES[code] if isinstance(code, int) else code
    cls = _BY_REASON.get(reason) or _BY_CODE.get(name, ClusterKVError)
    return cls(message, code=name, reason=reason, metadata=metadata)


def from_rpc_error(error) -> ClusterKVError:
    """A ``grpc.RpcError`` as the service's own exception."""
    from google.rpc import error_details_pb2, status_pb2

    code = error.code().name if error.code() else "UNKNOWN"
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            return from_status(status)
    return make_error(code, "", error.details() or "")


def from_status(status) -> ClusterKVError:
    """A ``google.rpc.Status`` (of one item of a batch) as the service's own exception."""
    from google.rpc import error_details_pb2

    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return make_error(status.code, info.reason, status.message, info.metadata)
    return make_error(status.code, "", status.message)
