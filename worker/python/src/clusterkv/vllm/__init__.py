"""vLLM with the KV of long prompts in the service, out of tree.

``ClusterKVConnector`` (a ``KVConnectorBase_V1``) streams prompts in while they are computed, finds them again
by their tokens, attaches decode requests and reports what could not be loaded. ``ClusterKVBackend`` (the
CUSTOM slot of vLLM's attention backends) has what a connector never sees, the query: it selects and recalls.

    vllm serve MODEL --attention-backend CUSTOM --no-enable-prefix-caching --kv-transfer-config '{
        "kv_connector": "ClusterKVConnector", "kv_connector_module_path": "clusterkv.vllm.connector",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"server": "HOST:PORT", "preset": "default", "budget": 64}}'

``connector`` and ``backend`` import vLLM; ``prompts`` and ``worker`` do not.
"""

from __future__ import annotations


def register() -> None:
    """vLLM's plugin entry point (group ``vllm.general_plugins``): takes the CUSTOM slot."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, "clusterkv.vllm.backend.ClusterKVBackend")
