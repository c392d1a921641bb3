"""Expressions: drawn, changed, mixed, simplified, evaluated by layer.

tree:   op(mean(u2(u1(A_l))), mean(u4(u3(B_l))))        linear: mean(u4(u3(u2(u1(A_l)))))
graph:  node_i = sum of unary-transformed earlier states, i from 1 to 3; mean of the nodes' means
S(b) = sum_l b_l score_l
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eff_quant_emq.config import EMQConfig
from eff_quant_emq.operators import BINARY, BINARY_SHARES, UNARY, UNARY_SHARES

Genes = dict[str, Any]
"""JSON: structure, inputs, unary (lists of operators), binary, sign."""
CHAIN, NODES = 4, 3
IDEMPOTENT = {"abs", "relu"}
NOT_NEGATIVE = {"square", "exp", "sigmoid", "softmax", "sqrt", "abs", "relu", "frobenius_norm", "l1_norm"}


def draw(names: Sequence[str], shares: Mapping[str, float], config: EMQConfig, rng: random.Random) -> str:
    """Return an operator, by its published share or evenly."""
    weights = [shares[name] for name in names] if config.prioritised else None
    return rng.choices(list(names), weights)[0]


def random_genes(sources: Sequence[str], config: EMQConfig, rng: random.Random) -> Genes:
    """Return an expression of the chosen structure over the named inputs."""

    def chain(length: int) -> list[str]:
        return [draw(list(UNARY), UNARY_SHARES, config, rng) for _ in range(length)]

    genes: Genes = {"structure": config.structure, "sign": 1}
    if config.structure == "linear":
        return genes | {"inputs": [rng.choice(list(sources))], "unary": [chain(CHAIN)], "binary": "sum"}
    inputs = [rng.choice(list(sources)) for _ in range(2)]
    if config.structure == "tree":
        return genes | {
            "inputs": inputs, "unary": [chain(2), chain(2)], "binary": draw(list(BINARY), BINARY_SHARES, config, rng),
        }  # fmt: skip
    return genes | {"inputs": inputs, "unary": [chain(node + 2) for node in range(NODES)], "binary": "sum"}


def mutated(genes: Genes, sources: Sequence[str], config: EMQConfig, rng: random.Random) -> Genes:
    """Return a copy with each gene redrawn with probability p_mut."""
    fresh = random_genes(sources, config, rng)

    def pick(old: Any, new: Any) -> Any:
        return new if rng.random() < config.p_mut else old

    return {
        "structure": genes["structure"],
        "sign": 1,
        "inputs": [pick(*pair) for pair in zip(genes["inputs"], fresh["inputs"], strict=True)],
        "unary": [
            [pick(*pair) for pair in zip(old, new, strict=True)]
            for old, new in zip(genes["unary"], fresh["unary"], strict=True)
        ],
        "binary": pick(genes["binary"], fresh["binary"]),
    }


def crossed(one: Genes, other: Genes, rng: random.Random) -> Genes:
    """Return a child: inputs and unary operators of either parent evenly, the first one's binary with 0.2."""

    def either(a: Any, b: Any) -> Any:
        return a if rng.random() < 0.5 else b

    return {
        "structure": one["structure"],
        "sign": 1,
        "inputs": [either(*pair) for pair in zip(one["inputs"], other["inputs"], strict=True)],
        "unary": [
            [either(*pair) for pair in zip(a, b, strict=True)]
            for a, b in zip(one["unary"], other["unary"], strict=True)
        ],
        "binary": one["binary"] if rng.random() < 0.2 else other["binary"],
    }


def simplified(genes: Genes) -> str:
    """Return a text that is equal for expressions that are equal by their operators alone."""
    chains = [_simple(chain) if genes["structure"] != "graph" else chain for chain in genes["unary"]]
    return json.dumps([genes["structure"], genes["inputs"], chains, genes["binary"]])


def _simple(chain: Sequence[str]) -> list[str]:
    kept: list[str] = []
    for name in chain:
        if name == "no_op":
            continue
        if name == "revert" and kept and kept[-1] == "revert":
            kept.pop()
        elif name == "abs" and kept and kept[-1] in NOT_NEGATIVE or name in IDEMPOTENT and kept and kept[-1] == name:
            continue
        else:
            kept.append(name)
    return kept


def layer_scores(genes: Genes, inputs: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """Return the score of each layer, float64 (L,); entries may be NaN or infinite."""
    scores = [_score(genes, values) for values in zip(*(inputs[name] for name in genes["inputs"]), strict=True)]
    return genes["sign"] * torch.stack(scores).double()


def _score(genes: Genes, values: Sequence[Tensor]) -> Tensor:
    if genes["structure"] == "graph":
        return _graph(genes, values)
    ends = []
    for value, chain in zip(values, genes["unary"], strict=True):
        for name in chain:
            value = UNARY[name](value)
        ends.append(value.float().mean())
    return ends[0] if len(ends) == 1 else BINARY[genes["binary"]](*ends)


def _graph(genes: Genes, values: Sequence[Tensor]) -> Tensor:
    """Every node adds unary-transformed versions of both inputs and the nodes before; shapes differ, so by their means."""
    states = list(values)
    nodes = []
    for chain in genes["unary"]:
        total = torch.stack(
            [UNARY[name](state).float().mean() for name, state in zip(chain, states, strict=True)]
        ).sum()
        states.append(total)
        nodes.append(total)
    return torch.stack(nodes).mean()


RELEASED: Genes = {
    "structure": "tree", "sign": 1, "inputs": ["virtual_grad", "weight"],
    "unary": [["abslog", "l1_norm"], ["square", "logsoftmax"]], "binary": "product",
}  # fmt: skip
"""The authors' expression; which operators its ids stand for is inferred."""
