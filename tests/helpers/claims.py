"""The table of docs/your-tokenizer.md: claims on each kind of module, each with a check that it holds.

``python -m tests.helpers.claims`` writes the rows into the page; tests run every check and compare the page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from alit_kernels.accelerate.families import FAMILIES

from .checks import (
    Check,
    all_keys_masked,
    all_of,
    attends,
    entropy_turned_on,
    half_and_autocast,
    masked,
    nested,
    not_swapped,
    on_a_gpu,
    one_hot_matrix,
    passed_on,
    residual,
    sharded,
    swapped,
    training_and_evaluation,
    within_autocast,
)
from .peers import left_alone

PAGE = Path(__file__).parents[2] / "docs" / "your-tokenizer.md"
#: Head of the table in the page.
HEADER = "| kind | classes | works | other than before | left to the code that was there |\n|---|---|---|---|---|\n"


@dataclass(frozen=True)
class Row:
    """Row of the table: the entries for one kind of module, each with its check."""

    classes: str
    works: dict[str, Check]
    left: dict[str, Check]
    differs: dict[str, Check] = field(default_factory=dict)

    def __str__(self) -> str:
        classes = ", ".join(f"`{name}`" for name in self.classes.split())
        cells = (classes, *(", ".join(each) for each in (self.works, self.differs, self.left)))
        return " |".join(f" {cell}" if cell else "" for cell in cells) + " |"


X, PADDING = (2, 5, 16), torch.arange(5) > torch.tensor([[4], [2]])


def causal(n: int) -> Tensor:
    """Additive causal mask, (n, n): 0 or -inf."""
    return torch.zeros(n, n).masked_fill(torch.ones(n, n).triu(1) > 0, -torch.inf)


LAST = causal(5)
TRANSFORMERS = ("Chameleon", "Janus", "GLM-Image")

ROWS: dict[str, Row] = {
    "attention": Row(
        classes="torch.nn.MultiheadAttention",
        works={
            "self- and cross-attention": all_of(
                attends(X, ours=True), attends(X, (2, 7, 16), ours=True)
            ),
            "boolean `key_padding_mask`": attends(X, ours=True, key_padding_mask=PADDING),
            "`is_causal` where torch goes by it alone": attends(
                X, ours=True, attn_mask=LAST, is_causal=True
            ),
            "`attn_mask` that is stops, of 2^16 entries and more, on a CPU": attends(
                (1, 256, 16), ours=True, attn_mask=causal(256)
            ),
            "either layout": all_of(
                *(attends(X, ours=True, batch_first=each) for each in (True, False))
            ),
            "autocast": attends(X, ours=True, within=within_autocast),
        },
        differs={
            "a query whose keys are all masked gives the projection of zeros, where torch's fast path gives NaN": (
                all_keys_masked
            )
        },
        left={
            "`need_weights`": attends(X, ours=False, need_weights=True),
            "other `attn_mask`": attends(X, ours=False, attn_mask=LAST),
            "`is_causal` with `key_padding_mask` or in torch's fast path": attends(
                X, ours=False, attn_mask=LAST, is_causal=True, key_padding_mask=PADDING
            ),
            "additive masks": attends(X, ours=False, key_padding_mask=PADDING.float()),
            "dropout in training": attends(X, ours=False, dropout=0.3),
            "`add_bias_kv`": not_swapped("add_bias_kv"),
            "`add_zero_attn`": not_swapped("add_zero_attn"),
            "`kdim`": not_swapped("kdim"),
            "`vdim`": not_swapped("vdim"),
            "one sequence without a batch": attends((5, 16), ours=False),
            "nested tensors": nested,
            "DTensors": sharded,
            "subclasses": not_swapped("a subclass"),
        },
    ),
    "TiTok": Row(
        classes="VectorQuantizer",
        works={
            "`use_l2_norm` or not": swapped("TiTok", "TiTok, cosine"),
            "half precision": swapped("TiTok, cosine", call=lambda module, x: module(x.bfloat16())),
            "autocast on a GPU": on_a_gpu("TiTok", within_autocast),
        },
        left={
            "`clustering_vq`": not_swapped("clustering"),
            "autocast on a CPU": passed_on("TiTok", call=within_autocast),
        },
    ),
    "GigaTok": Row(
        classes="VectorQuantizer",
        works={"`show_usage`": swapped("GigaTok")},
        left={
            "`rot`": not_swapped("the rotation trick"),
            "`stochastic`": not_swapped("stochastic codes"),
            "`simvq`": not_swapped("SimVQ"),
            **entropy_turned_on("GigaTok"),
            **half_and_autocast("GigaTok"),
        },
    ),
    "GigaTok, entropy loss": Row(
        classes="VectorQuantizer",
        works=training_and_evaluation("GigaTok, entropy"),
        left=half_and_autocast("GigaTok, entropy"),
    ),
    "LlamaGen": Row(
        classes="VectorQuantizer",
        works={
            "`l2_norm` or not": swapped("LlamaGen", "LlamaGen, cosine, usage"),
            "`show_usage`": swapped("LlamaGen, cosine, usage"),
        },
        left={**entropy_turned_on("LlamaGen"), **half_and_autocast("LlamaGen")},
    ),
    "LlamaGen, entropy loss": Row(
        classes="VectorQuantizer",
        works={"`l2_norm` or not": swapped("LlamaGen, entropy", "LlamaGen, cosine, entropy")},
        left={
            "an entropy loss of another temperature": all_of(
                *(not_swapped(name) for name in left_alone() if "another temperature" in name)
            ),
            **half_and_autocast("LlamaGen, entropy"),
        },
    ),
    "taming": Row(
        classes="VectorQuantizer2",
        works={
            "`legacy` or not": swapped("taming", "taming, legacy"),
            "`sane_index_shape`": swapped("taming, legacy"),
        },
        left={"`remap`": not_swapped("remap"), **half_and_autocast("taming")},
    ),
    "diffusers": Row(
        classes="VectorQuantizer",
        works={
            "`legacy` or not": swapped("diffusers", "diffusers, legacy"),
            "`sane_index_shape`": swapped("diffusers, legacy"),
        },
        left={"`remap`": not_swapped("diffusers, remap"), **half_and_autocast("diffusers")},
    ),
    "taming, one-hot": Row(
        classes="VectorQuantizer",
        works=training_and_evaluation("taming, one-hot"),
        differs={"the one-hot matrix that it returns is still made": one_hot_matrix},
        left=half_and_autocast("taming, one-hot"),
    ),
    "transformers": Row(
        classes="ChameleonVQVAEVectorQuantizer JanusVQVAEVectorQuantizer GlmImageVQVAEVectorQuantizer",
        works=training_and_evaluation(*TRANSFORMERS),
        left=half_and_autocast(*TRANSFORMERS),
    ),
    "transformers, Emu3": Row(
        classes="Emu3VQVAEVectorQuantizer",
        works=training_and_evaluation("Emu3"),
        left=half_and_autocast("Emu3"),
    ),
    "vector-quantize-pytorch": Row(
        classes="VectorQuantize",
        works={
            "moving averages or learned": swapped("lucidrains", "lucidrains, learned"),
            "cosine": swapped("lucidrains, cosine"),
            "masks": swapped("lucidrains", call=masked),
            "projections": swapped("lucidrains, projected heads"),
            "heads": swapped("lucidrains, projected heads"),
            "dead codes": swapped("lucidrains, dead codes"),
            "frozen codebooks": swapped(
                "lucidrains", call=lambda module, x: module(x, freeze_codebook=True)
            ),
            "rotation trick": swapped("lucidrains, rotation"),
            "images": swapped("lucidrains, learned"),
            "`ResidualVQ` and others that are made of it": residual,
        },
        left={
            "sampled and top-k codes": all_of(
                not_swapped("sampled"),
                passed_on("lucidrains", call=lambda module, x: module(x, topk=2)),
            ),
            "autocast on a CPU": passed_on("lucidrains", call=within_autocast),
            "`indices` given": passed_on(
                "lucidrains", call=lambda module, x: module(x, torch.arange(30))
            ),
            "a codebook for each head": not_swapped("a codebook for each head"),
            "`affine_param`": not_swapped("affine_param"),
            "`vq_bridge`": not_swapped("vq_bridge"),
            "optimizers of its own": not_swapped("an optimizer of its own"),
            "diversity and cross-entropy losses": not_swapped(
                "diversity", "the cross-entropy commitment"
            ),
            "sums over processes": not_swapped("its statistics are summed over processes"),
            "k-means still to come": not_swapped("k-means"),
        },
    ),
}


def claims() -> dict[str, Check]:
    """Check of every entry of the table, by "row / column / entry"."""
    return {
        f"{kind} / {column} / {entry}": check
        for kind, row in ROWS.items()
        for column in ("works", "differs", "left")
        for entry, check in getattr(row, column).items()
    }


def page_with(rows: str) -> str:
    """Text of the page with these rows in its table."""
    before, found, after = PAGE.read_text().partition(HEADER)
    assert found, "the header of the table is another one"
    lines = after.splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if not line.startswith("| ")), len(lines))
    return before + HEADER + rows + "".join(lines[first:])


def table() -> str:
    return "".join(f"| {kind} |{row}\n" for kind, row in ROWS.items())


if __name__ == "__main__":
    assert ROWS.keys() - {"attention"} == FAMILIES.keys()
    PAGE.write_text(page_with(table()))
