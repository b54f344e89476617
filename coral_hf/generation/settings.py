"""DraftSettings: the size of a draft, from the drafter's config, a generation config and per-call overrides."""

from dataclasses import dataclass, fields
from typing import Any

from ..drafter.configuration_checks import DRAFT_HEADS
from ..drafter.configuration_coral import DERIVED, check_draft_sizes, most_draft_tokens
from ..drafter.draft_head import DraftHead


@dataclass(frozen=True)
class DraftSettings:
    """How much is drafted per step.

    If a call sets `draft_depth` or `draft_top_k`, the total in the drafter's config still limits its tree.
    `draft_total_tokens=None` removes the limit. A chain is always drafted to the depth that the call sets.

    Args:
        draft_depth (`int`): levels drafted below the root; a chain's length.
        draft_top_k (`int`): branches per node and nodes expanded per level; 1 drafts a chain.
        draft_total_tokens (`int`, *optional*): verified nodes, including the root; None: all that depth and top_k can
            produce. The depth is at most one less than this.
        draft_head (`str`, *optional*): tokens to draft from: the "full" vocabulary (or all of the drafter's own head),
            "shortlist", "router" (its active groups) or "both"; "low_rank", the best ids of the low-rank head; or "context", the ids
            of the text so far and of the shortlist. None: the low-rank head, else shortlist and router, else the whole head.
        draft_active_groups (`int`, *optional*): router groups per step; None: the drafter's.
        draft_groups_per_row (`bool`): choose groups for every node of a tree level, instead of sharing them.
        draft_scoring (`str`): log q from the "active" logits, or from the "router" times the softmax within the group.
        draft_stock_loop (`bool`): use Transformers' assisted loop (chains only) instead of CORAL's.
        draft_cost_aware (`bool`): choose depth and nodes at every step from measured costs (see
            `generation.tree_size`); depth, top_k and total_tokens are then upper limits. A call that sets sizes drafts exactly
            these, unless it sets this as well.
        draft_lookup (`bool`): if the last tokens occurred earlier in prompt or answer, also add the tokens that followed them
            there to the tree (see `generation.lookup`). A step may verify only these. A chain is either drafted or looked
            up at each step.
        draft_compile (`bool`): draft and verify in compiled graphs of fixed shapes (see `generation.compiled`), with the
            `compile_config` of the generation config. This is a setting of calls, not of drafters, because it depends on the
            machine.
    """

    draft_depth: int = 5
    draft_top_k: int = 1
    draft_total_tokens: int = DERIVED
    draft_head: str | None = None
    draft_active_groups: int | None = None
    draft_groups_per_row: bool = False
    draft_scoring: str = "active"
    draft_stock_loop: bool = False
    draft_cost_aware: bool = False
    draft_lookup: bool = False
    draft_compile: bool = False

    def __post_init__(self):
        check_draft_sizes(self.draft_depth, self.draft_top_k, self.draft_total_tokens)
        if self.draft_total_tokens is None:
            object.__setattr__(self, "draft_total_tokens", self.max_total_tokens)
        for name in ("draft_groups_per_row", "draft_stock_loop", "draft_cost_aware", "draft_lookup", "draft_compile"):
            if not isinstance(getattr(self, name), bool):  # the string "false" would count as true
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False.")
        if self.draft_head not in (None, *DRAFT_HEADS):
            raise ValueError(f"draft_head={self.draft_head!r} is unknown; choose one of {list(DRAFT_HEADS)}.")
        groups = self.draft_active_groups
        if groups is not None and (not isinstance(groups, int) or isinstance(groups, bool) or groups < 1):
            raise ValueError(
                f"draft_active_groups={groups!r} must be an integer of at least 1; use draft_head='full' for all."
            )
        if self.draft_scoring not in ("active", "router"):
            raise ValueError(f"draft_scoring={self.draft_scoring!r} is unknown; choose 'active' or 'router'.")
        if self.draft_stock_loop and self.draft_top_k > 1:
            raise ValueError(
                f"draft_stock_loop=True verifies chains only, but draft_top_k={self.draft_top_k}. Set draft_top_k=1."
            )
        if self.draft_stock_loop and self.draft_lookup:
            raise ValueError(
                "draft_lookup=True adds nodes in CORAL's own loop, but draft_stock_loop=True runs Transformers'. Set one of them "
                "to False."
            )
        if self.draft_compile and self.draft_lookup:
            raise ValueError(
                "draft_compile=True drafts in graphs of fixed shapes, which cannot take the nodes of draft_lookup=True. Set one of "
                "them to False."
            )
        if self.draft_compile and self.draft_head == "context":
            raise ValueError(
                "draft_compile=True drafts in graphs of fixed shapes, and the list of draft_head='context' grows with the text. Set "
                "draft_compile=False, or choose another draft_head."
            )
        if self.draft_stock_loop and self.draft_compile:
            raise ValueError(
                "draft_compile=True compiles CORAL's own loop, but draft_stock_loop=True runs Transformers'. Set one of them "
                "to False."
            )

    @property
    def max_total_tokens(self) -> int:
        """Nodes that depth and top_k can produce."""
        return most_draft_tokens(self.draft_depth, self.draft_top_k)

    @property
    def max_levels(self) -> int:
        """Most levels below the root that can be verified, because a node is verified with all its ancestors."""
        return min(self.draft_depth, self.draft_total_tokens - 1)

    @property
    def is_chain(self) -> bool:
        return self.draft_top_k == 1

    def router_of(self, drafter: Any) -> Any:
        """The router that drafting with these settings uses; None if it uses none."""
        chosen = self.draft_head in ("router", "both")
        unchosen = self.draft_head is None and getattr(drafter, "low_rank", None) is None
        return getattr(drafter, "router", None) if chosen or unchosen else None

    def draft_head_of(self, drafter: Any, adapter: Any) -> DraftHead:
        """The head that drafting with these settings uses.

        Raises:
            ValueError: if the drafter lacks the part that a setting is about, or the router has fewer groups.
        """
        router, shortlist = self.router_of(drafter), getattr(drafter, "shortlist", None)
        own_head, low_rank = getattr(drafter, "draft_head", None), getattr(drafter, "low_rank", None)
        if own_head is not None and self.draft_head not in (None, "full"):
            raise ValueError(
                f"draft_head={self.draft_head!r} selects rows of the target's LM head, but this drafter has its own head "
                f"(draft_vocab_size={drafter.config.draft_vocab_size}): leave draft_head out."
            )
        if self.draft_head in ("router", "both") and router is None:
            raise ValueError(
                f"draft_head={self.draft_head!r}, but this drafter has no router; train one with "
                "`coral-hf train --stage router`, or use draft_head='full'."
            )
        if self.draft_head in ("shortlist", "both") and shortlist is None:
            raise ValueError(
                f"draft_head={self.draft_head!r}, but this drafter has no shortlist; add one with "
                "drafter.add_shortlist(counts, size), or use draft_head='full'."
            )
        if self.draft_head == "low_rank" and low_rank is None:
            raise ValueError(
                "draft_head='low_rank', but this drafter has no low-rank head; add one with "
                "drafter.add_low_rank_head(target, rank), or use draft_head='full'."
            )
        uses_low_rank = low_rank is not None and self.draft_head in (None, "low_rank")
        if uses_low_rank or self.draft_head in ("full", "router"):
            shortlist = None
        if router is None:
            about_groups = ("draft_active_groups", None), ("draft_groups_per_row", False), ("draft_scoring", "active")
            for name, unset in about_groups:
                if (value := getattr(self, name)) != unset:
                    raise ValueError(
                        f"{name}={value!r} is a setting for router groups, but no router is used. Remove it, or draft with a router "
                        "(draft_head='router', if the drafter has one)."
                    )
            if uses_low_rank:
                return DraftHead(adapter, low_rank=low_rank, candidates=drafter.config.low_rank_candidates)
            reads_text = self.draft_head == "context"
            return DraftHead(adapter, None, shortlist, own_head=own_head, reads_text=reads_text)
        active = self.draft_active_groups or drafter.config.router_active_groups or 1
        if active > router.num_groups:
            raise ValueError(
                f"draft_active_groups={active} is more than the router's {router.num_groups} groups; lower it, or use "
                "draft_head='full'."
            )
        if shortlist is not None and self.draft_scoring == "router":
            raise ValueError(
                "draft_scoring='router' needs the active groups alone; set draft_head='router' or "
                "draft_scoring='active'."
            )
        return DraftHead(adapter, router, shortlist, active, self.draft_groups_per_row, self.draft_scoring)

    @classmethod
    def resolve(cls, config: Any, generation_config: Any = None, overrides: dict | None = None) -> "DraftSettings":
        """The settings of one call. Overrides take precedence over the generation config, and that over the drafter's config.

        Raises:
            ValueError: on an unknown `draft_*` key, a value out of range or contradictory sizes.
        """
        names = [field.name for field in fields(cls)]
        given = {} if generation_config is None else dict(vars(generation_config))
        given = {key: value for key, value in given.items() if key.startswith("draft_")} | (overrides or {})
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"Unknown draft setting(s) {unknown}; the settings are {names}.")
        # None means unset, except for the total, where it means all that depth and top_k produce
        given = {key: value for key, value in given.items() if value is not None or key == "draft_total_tokens"}
        defaults = {name: getattr(config, name, None) for name in names if name != "draft_compile"}
        defaults = {name: value for name, value in defaults.items() if value is not None}
        if {"draft_depth", "draft_top_k", "draft_total_tokens"} & set(given):
            # Sizes set by a call are used exactly: the config's cost-aware rule only applies to the config's sizes.
            given.setdefault("draft_cost_aware", False)
        if {"draft_depth", "draft_top_k"} & set(given) and "draft_total_tokens" not in given:
            # The config's total belongs to the config's depth and top_k, so it is adapted to the new ones.
            total = defaults.pop("draft_total_tokens", None)
            whole = cls(**{**defaults, **given})
            if total is not None and not whole.is_chain:
                given["draft_total_tokens"] = min(total, whole.max_total_tokens)
        return cls(**{**defaults, **given})


__all__ = ["DraftSettings"]
