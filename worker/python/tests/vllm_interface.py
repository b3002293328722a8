"""vLLM's interface as far as clusterkv.vllm uses it, for machines without vLLM: the base classes of 0.33's
kv_connector/v1/base.py and attention/backend.py with the same names and parameters, and no behaviour.

``install()`` makes them importable unless the real ones are.
"""

from __future__ import annotations

import enum
import sys
import types
from abc import ABC, abstractmethod
from typing import Generic, TypeVar


def real() -> bool:
    try:
        import vllm.distributed.kv_transfer.kv_connector.v1.base  # noqa: F401

        return not getattr(sys.modules["vllm"], "is_stand_in", False)
    except ImportError:
        return False


class KVConnectorRole(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class KVConnectorMetadata(ABC):
    pass


class KVConnectorBase_V1(ABC):
    def __init__(self, vllm_config, role, kv_cache_config):
        self._connector_metadata = None
        self._kv_transfer_config = vllm_config.kv_transfer_config
        self._role = role

    @property
    def role(self):
        return self._role

    def bind_connector_metadata(self, connector_metadata):
        self._connector_metadata = connector_metadata

    def clear_connector_metadata(self):
        self._connector_metadata = None

    def _get_connector_metadata(self):
        assert self._connector_metadata is not None
        return self._connector_metadata

    @abstractmethod
    def start_load_kv(self, forward_context, **kwargs): ...
    @abstractmethod
    def wait_for_layer_load(self, layer_name): ...
    @abstractmethod
    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs): ...
    @abstractmethod
    def wait_for_save(self): ...
    @abstractmethod
    def get_num_new_matched_tokens(self, request, num_computed_tokens): ...
    @abstractmethod
    def update_state_after_alloc(self, request, blocks, num_external_tokens): ...
    @abstractmethod
    def build_connector_meta(self, scheduler_output): ...


M = TypeVar("M")


class AttentionBackend(ABC):
    pass


class AttentionCGSupport(enum.Enum):
    NEVER = 0


class AttentionMetadata:
    pass


class AttentionMetadataBuilder(ABC, Generic[M]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.device = device

    @abstractmethod
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False): ...


class AttentionImpl(ABC, Generic[M]):
    @abstractmethod
    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None,
                output_block_scale=None): ...


class AttentionType(str, enum.Enum):
    DECODER = "decoder"


class CommonAttentionMetadata:
    pass


def install() -> None:
    if real():
        return
    connector = {"KVConnectorBase_V1": KVConnectorBase_V1, "KVConnectorMetadata": KVConnectorMetadata,
                 "KVConnectorRole": KVConnectorRole}
    backend = {c.__name__: c for c in (AttentionBackend, AttentionCGSupport, AttentionImpl,
                                       AttentionMetadata, AttentionMetadataBuilder, AttentionType,
                                       CommonAttentionMetadata)}
    for path, names in (("vllm.distributed.kv_transfer.kv_connector.v1.base", connector),
                        ("vllm.v1.attention.backend", backend)):
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            if name not in sys.modules:
                module = sys.modules[name] = types.ModuleType(name)
                module.__path__ = []
                module.is_stand_in = True
                if i > 1:
                    setattr(sys.modules[".".join(parts[:i - 1])], parts[i - 1], module)
        vars(sys.modules[path]).update(names)
