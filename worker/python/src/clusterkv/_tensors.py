"""PyTorch tensors as the native worker takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def host(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous host array of the tensor's bits."""
    tensor = tensor.detach().contiguous().cpu()
    return tensor.view(torch.int16).numpy() if tensor.element_size() == 2 else tensor.numpy()


def put(writer: Any, layer: int, first_token: int, keys: torch.Tensor, values: torch.Tensor,
        query_rms: np.ndarray) -> None:
    """Gives a ``PrefillWriter`` rows [tokens, kv_heads, head_dim]: from the GPU where the server can read it,
    else through host memory. They may be overwritten by what the current stream does next."""
    tokens, taken = keys.shape[0], 0
    if keys.is_cuda:
        taken = writer.put_from_gpu(layer, first_token, keys.detach(), values.detach(), query_rms,
                                    torch.cuda.current_stream(keys.device).cuda_stream)
    if taken < tokens:
        writer.put(layer, first_token + taken, tokens - taken, host(keys[taken:]), host(values[taken:]), query_rms)
