"""Client of the ClusterKV cache service.

``Client``, ``AdminClient`` and ``clusterkv.aio.Client`` speak the whole API in pure Python.
``clusterkv.transformers`` runs Hugging Face models with their KV in the service (native worker).
"""

from clusterkv.client import AdminClient, Client, Session, tls
from clusterkv.errors import (AbortedError, AlreadyExistsError, CapacityError, ClusterKVError,
                              DataLossError, DeadlineError, InvalidRequestError, NotFoundError,
                              NotOwnerError, NotReadyError, RefusedError, StaleHandleError,
                              UnavailableError, UnsupportedError)

__version__ = "0.1.0"
__all__ = ["AbortedError", "AdminClient", "AlreadyExistsError", "CapacityError", "Client",
           "ClusterKVError", "DataLossError", "DeadlineError", "InvalidRequestError",
           "NotFoundError", "NotOwnerError", "NotReadyError", "RefusedError", "Session",
           "StaleHandleError", "UnavailableError", "UnsupportedError", "tls"]
