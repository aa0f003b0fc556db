"""Two checkpoints of one network, of which one learnt on from the other, averaged.

    python benchmarks/average_weights.py FILE OTHER --share 0.3 -o OUTPUT

--share: of OTHER, the rest is FILE's. Weights near each other on one training path often have an average that is better
than both (model soups, Wortsman et al. 2022, arXiv:2203.05482); whether these do, held-out images say. Written in
float16 where both are.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import torch

from edgesam_deploy.files import sha256_bytes, write_bytes
from edgesam_deploy.models.state_dict import read_state_dict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--share", type=float, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    first, other = read_state_dict(options.file), read_state_dict(options.other)
    if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in other.items()}:
        sys.exit(f"{options.file} and {options.other} are not of the same network")
    averaged = {
        name: torch.lerp(tensor.float(), other[name].float(), options.share).to(
            torch.promote_types(tensor.dtype, other[name].dtype)
        )
        if tensor.is_floating_point()
        else tensor
        for name, tensor in first.items()
    }
    buffer = io.BytesIO()
    torch.save(averaged, buffer)
    write_bytes(options.output, buffer.getvalue())
    print(f"{options.output} (sha256 {sha256_bytes(buffer.getvalue())})")


if __name__ == "__main__":
    main()
