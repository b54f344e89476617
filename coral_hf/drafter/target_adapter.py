"""TargetAdapter: the parts of a target that a drafter uses (embedding, features and LM head), with their scaling."""

import os
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_coral import CoralDraftConfig
from .output_hooks import copied_without_hooks


_DTYPES_OF_ROWS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def placed(x: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Moves `x` to a device and dtype, without any operation if it is already there."""
    dtype = x.dtype if dtype is None else dtype
    return x if x.device == device and x.dtype == dtype else x.to(device=device, dtype=dtype)


def active_adapters(layer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Weights of a layer's active, unmerged PEFT adapters, by name."""
    # PEFT's layers are around the target's own
    if (
        not hasattr(layer, "base_layer")
        or getattr(layer, "merged", False)
        or getattr(layer, "disable_adapters", False)
    ):
        return {}
    active = set(getattr(layer, "active_adapters", ()))
    weights = {name: weight for name, weight in layer.named_parameters() if not name.startswith("base_layer.")}
    return {name: weight for name, weight in weights.items() if active & set(name.split("."))}


def active_prompt(model: Any) -> str | None:
    """The type of the learnt prompt that a PEFT wrapper puts before every text (for example PROMPT_TUNING); None if none."""
    config: Any = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return None
    return str(getattr(config.peft_type, "value", config.peft_type))


def resolve_target(target: Any, argument: str = "target") -> Any:
    """Returns a target. If it is given by path or Hub id, loads it in its checkpoint's dtype.

    Args:
        target (`PreTrainedModel`, `str` or `os.PathLike`), argument (`str`): the name of the argument, for errors.

    Raises:
        ValueError: if it is not a model, or is a CORAL drafter.
        OSError: if the folder or repository does not exist.
    """
    is_name = isinstance(target, str | os.PathLike)
    try:
        config = AutoConfig.from_pretrained(target) if is_name else getattr(target, "config", None)
    except OSError as error:
        raise OSError(
            f"{argument}={os.fspath(target)!r} is not a folder here, and could not be loaded from the Hub: check the path, or the "
            f"spelling and your access. ({error})"
        ) from error
    if getattr(config, "model_type", None) == CoralDraftConfig.model_type:
        named = f"{argument}={os.fspath(target)!r}" if is_name else argument
        raise ValueError(f"{named} is a CORAL drafter: pass the causal LM that the drafter is for.")
    if is_name:
        return AutoModelForCausalLM.from_pretrained(target, dtype="auto").eval()
    if not isinstance(target, torch.nn.Module) or config is None:
        raise ValueError(
            f"{argument} is of type {type(target).__name__}: pass a causal LM (AutoModelForCausalLM.from_pretrained(...)), or "
            "its path or Hub id."
        )
    return target


class TargetAdapter:
    """The three views of a target model that drafting needs, for every Llama-shaped family, without forking a model.

    Scalings that a family applies outside its embedding and LM-head modules (Granite's multipliers, Cohere's logit
    scale, Gemma's soft-capping) are applied here, so that `logits(features(outputs)) == outputs.logits`
    ([`check_identity`] asserts this whenever a drafter is made or trained). The adapter has no weights of its own, only a
    reference to the target. It is passed to the drafter in each call.

    Args:
        target (`PreTrainedModel`): a causal LM; a PEFT wrapper is unwrapped, a multimodal model's text part is used.
        feature_layers (`list[int]`, defaults to `[-1]`): see `CoralDraftConfig.target_feature_layers`.

    Raises:
        ValueError: if the target is an encoder-decoder, has several hidden states per token, or has no LM head with a weight.
    """

    def __init__(self, target: Any, feature_layers: list[int] | None = None):
        # PEFT's wrapper keeps the adapters inside the base model's modules: the base model computes the same.
        if (prompt := active_prompt(target)) is not None:
            raise ValueError(
                f"The active adapter of the target is a learnt prompt ({prompt}), which comes before the text and is not part of its "
                "layers, so that a drafter would learn another model. Pass the model without it (target.get_base_model()), or tune "
                "the target with LoRA."
            )
        base = target.get_base_model() if hasattr(target, "get_base_model") else target
        config = base.config
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"target {type(base).__name__} is an encoder-decoder; CORAL drafts for decoder-only causal LMs: load "
                "one of those."
            )
        if (getattr(config.get_text_config(), "altup_num_inputs", None) or 1) > 1:
            raise ValueError(
                f"target {type(base).__name__} carries several hidden states for each token (AltUp), but a drafter reads "
                "one: choose another target (for example Gemma 3 or 4)."
            )
        self.target = base
        self.text_config = config.get_text_config()
        self.feature_layers = list(feature_layers or [-1])
        # The hidden states to request: all, unless the caller knows that the target can select (`hidden_states_to_ask`, which is
        # not part of a published drafter's code).
        self.output_hidden_states: list[int] | bool = True
        self.embedding = base.get_input_embeddings()
        self.head = base.get_output_embeddings()
        if self.head is None:
            raise ValueError(f"target {type(base).__name__} has no LM head; load it with AutoModelForCausalLM.")
        if not isinstance(getattr(self.head, "weight", None), torch.Tensor):
            raise ValueError(
                f"The LM head of target {type(base).__name__} is a {type(self.head).__name__} without a weight tensor (of "
                "torch's quantize_dynamic, for example), which a drafter cannot share: leave lm_head out of the quantisation."
            )
        text = self.text_config
        self._embedding_scale = float(getattr(text, "embedding_multiplier", None) or 1.0)
        # Cohere multiplies by logit_scale, Granite divides by logits_scaling, and HyperCLOVAX multiplies by it
        scaling = float(getattr(text, "logits_scaling", None) or 1.0)
        multiplies = str(text.model_type).startswith("hyperclovax")
        self._logit_scale = float(getattr(text, "logit_scale", None) or 1.0) * (scaling if multiplies else 1 / scaling)
        self._softcap = getattr(text, "final_logit_softcapping", None)

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def embedding_scale(self) -> float:
        """The factor of the embedding's rows in [`embed`], inside and outside of its module; 1.0 for most families."""
        module = self.embedding
        while hasattr(module, "base_layer"):  # PEFT's, around the target's own
            module = module.base_layer
        # Transformers' scaled embeddings (Gemma's, MiniCPM3's): the buffer has no value on the meta device, its source has
        inside = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0))
        return float(inside) * self._embedding_scale

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The input embeddings of the target's first layer, `[..., H]` for ids `[...]`."""
        embeddings = self.embedding(placed(ids, self.embedding.weight.device))
        return embeddings * self._embedding_scale if self._embedding_scale != 1.0 else embeddings

    def features(self, outputs: Any) -> torch.Tensor:
        """Features from a forward pass that kept the hidden states of the feature layers: `[B, S, n * H]` for n layers."""
        return self.features_of(outputs.hidden_states)

    def features_of(self, hidden_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The feature layers of a tuple of hidden states (the last one is after the final norm)."""
        picked = [hidden_states[layer] for layer in self.feature_layers]
        return picked[0] if len(picked) == 1 else torch.cat(picked, dim=-1)

    @torch.no_grad()
    def compute_features(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Runs the target without its LM head: ids `[B, S]` -> features `[B, S, n * H]`."""
        decoder = self.target.get_decoder() if hasattr(self.target, "get_decoder") else self.target.base_model
        only_last = self.feature_layers == [-1]
        asked = False if only_last else self.output_hidden_states
        with copied_without_hooks(decoder):
            outputs = decoder(input_ids=input_ids, use_cache=False, output_hidden_states=asked, **kwargs)
        return outputs.last_hidden_state if only_last else self.features_of(outputs.hidden_states)

    def logits(self, features: torch.Tensor, token_ids: torch.Tensor | slice | None = None) -> torch.Tensor:
        """The target's logits of (post-norm) features.

        Args:
            features (`torch.Tensor` of shape `[..., H]`).
            token_ids (`torch.LongTensor` of shape `[A]` or `slice`, *optional*): rows of the head to compute.

        Returns:
            `torch.Tensor` of shape `[..., V]`, or `[..., A]` with `token_ids`, in the head's dtype.
        """
        weight, bias = self.head.weight, getattr(self.head, "bias", None)
        if token_ids is not None:
            self.check_rows()
            weight = weight[token_ids]
            bias = None if bias is None else bias[token_ids]
            logits = F.linear(features.to(weight), weight, bias)
        else:
            # Calls the module, so that quantised and offloaded heads work.
            logits = self.head(placed(features, weight.device, self.head_dtype))
        return self.transform_logits(logits)

    @property
    def has_rows(self) -> bool:
        """Whether single rows of the head can be computed, as a shortlist or router needs."""
        try:
            self.check_rows()
        except ValueError:
            return False
        return True

    def check_rows(self) -> None:
        """Raises `ValueError` if single rows of the head cannot be used. Rows of a quantised weight are codes or packed, and
        rows of a head with an adapter lack the adapter's part."""
        if active_adapters(self.head):
            raise ValueError(
                f"The LM head of {type(self.target).__name__} has adapters beside its weight, whose rows alone would be scored "
                "without them. Merge the adapters (merge_adapter()), or draft from the full head with draft_head='full'."
            )
        weight = self.head.weight
        if type(weight) not in (torch.Tensor, torch.nn.Parameter) or weight.dtype not in _DTYPES_OF_ROWS:
            raise ValueError(
                f"The LM head of {type(self.target).__name__} contains {type(weight).__name__} of {weight.dtype}, of which single "
                "rows cannot be scored (it is quantised or sharded). Draft from the full head with draft_head='full', or load "
                "the target with an unquantised LM head."
            )

    def head_rows(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Copies of the head's rows `[..., H]` and its bias `[...]` (if it has one) for ids `[...]`. See [`check_rows`]."""
        self.check_rows()
        bias = getattr(self.head, "bias", None)
        token_ids = token_ids.to(self.device)
        return self.head.weight[token_ids].to(self.head_dtype), None if bias is None else bias[token_ids]

    @property
    def head_dtype(self) -> torch.dtype:
        dtype = self.head.weight.dtype
        return dtype if dtype.is_floating_point else self.target.dtype

    def transform_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """The elementwise part of the target's head: scale, then soft-cap."""
        if self._logit_scale != 1.0:
            logits = logits * self._logit_scale
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def check_drafter(self, config: Any) -> None:
        """Raises `ValueError` unless a drafter's config was made for a target of this type and these sizes.

        Names are not compared, because a drafter may be used with a fine-tuned or moved copy of its target.
        """
        text = self.text_config
        expected = {
            "vocab_size": (config.vocab_size, self.vocab_size),
            "hidden_size": (config.hidden_size, self.hidden_size),
            "model_type": (config.target_model_type, text.model_type),
            "num_hidden_layers": (config.target_num_hidden_layers, getattr(text, "num_hidden_layers", None)),
        }
        for name, (trained_for, found) in expected.items():
            if trained_for is not None and trained_for != found:
                raise ValueError(
                    f"This drafter was made for a target with {name}={trained_for!r} ({config.target_name_or_path!r}), "
                    f"but {type(self.target).__name__} has {found!r}. Load a drafter trained for this target, or train "
                    "one with CoralDraftModel.from_target(target)."
                )

    @torch.no_grad()
    def check_identity(self, atol: float = 1e-3) -> None:
        """Raises `ValueError` unless `logits(last feature)` are the target's logits on a two-token input.

        Mixing pre- and post-norm features is the most common silent bug in this field. This check also finds families whose
        head this class does not support. It is skipped if two tokens cannot be run: with weights on the meta device (including
        offloaded ones) or in shards, or with Flash- or FlexAttention on a CPU.

        Args:
            atol (`float`): tolerance, relative to the largest logit above 1. In bfloat16 and float16, their rounding is added.
        """
        if not self._can_run():
            return
        ids = torch.tensor([[1, 2]], device=self.embedding.weight.device) % self.vocab_size
        with copied_without_hooks(self.target):
            outputs = self.target(input_ids=ids, output_hidden_states=True, use_cache=False)
        expected = outputs.logits.float()
        found = self.logits(outputs.hidden_states[-1]).float().to(expected.device)
        problem = f"has the shape {list(found.shape)}, not {list(expected.shape)} as"
        if found.shape == expected.shape:
            gap = (found - expected).abs().max().item()
            if gap <= max(atol, 4 * torch.finfo(outputs.logits.dtype).eps) * max(1.0, expected.abs().max().item()):
                return
            problem = f"differs by {gap:.3g} from"
        raise ValueError(
            f"lm_head(feature) {problem} the logits of {type(self.target).__name__}: this family makes its logits in a way "
            "that TargetAdapter does not support, so that a drafter would learn wrong ones. Choose another target, or see "
            "CONTRIBUTING, 'Adding a target family'."
        )

    def _can_run(self) -> bool:
        parameters = list(self.target.parameters())
        whole = all(not parameter.is_meta and parameter.numel() for parameter in parameters)
        sharded = any(hasattr(parameter, "device_mesh") for parameter in parameters)  # a DTensor
        gpu_only = any(kind in str(self.text_config._attn_implementation) for kind in ("flash", "flex"))
        return whole and not sharded and not (gpu_only and self.device.type == "cpu")
