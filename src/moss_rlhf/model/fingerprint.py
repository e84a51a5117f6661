"""A name for a network's weights, so that what was measured on them is not believed of others."""

from __future__ import annotations

import hashlib
from typing import Any

from moss_rlhf.model.anatomy import anatomy_of


def network_digest(network: Any) -> str:
    """32 hexadecimal digits that name the blocks' and the head's parameters, their shapes and float32 bits.

    Embeddings are left out: a trimmed vocabulary changes no answer to texts whose tokens stay.
    """
    anatomy, found = anatomy_of(network), hashlib.blake2b(digest_size=16)
    inside = [parameter for block in anatomy.blocks for parameter in block.module.parameters()]
    for parameter in (*inside, *(parameter for _, parameter in anatomy.head)):
        values = parameter.detach().float().cpu().contiguous().numpy()
        found.update(str(values.shape).encode())
        found.update(values.tobytes())
    return found.hexdigest()
