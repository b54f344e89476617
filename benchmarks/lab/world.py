"""A small real target: its vocabulary, its training, and its answers to the beginnings of documents."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .text import documents, held_out


PAD, BEGIN, END = range(3)
_ANSWER_BATCH = 64


@dataclass(frozen=True)
class WorldSettings:
    """The settings of a world. Different settings need different folders.

    Args:
        vocab_size, hidden_size, num_layers (`int`): the target's sizes.
        target_tokens (`int`): tokens that it is trained on, in blocks of `block` tokens, `batch` of them per step.
        target_rate (`float`): AdamW's learning rate.
        prompt_tokens, answer_tokens (`int`): tokens of each row.
        answers, held_out_answers (`int`): rows for training and for measuring drafters, per temperature.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    target_tokens: int = 1_500_000
    target_rate: float = 3e-3
    block: int = 128
    batch: int = 16
    prompt_tokens: int = 32
    answer_tokens: int = 64
    answers: int = 1600
    held_out_answers: int = 128


@dataclass
class World:
    """The world in which drafters are trained.

    Args:
        target, tokenizer
        rows (`dict[str, list[dict]]`): `train`, and held-out rows by their temperature.
        facts (`dict`): facts about the target, for the record.
    """

    target: Any
    tokenizer: Any
    rows: dict[str, list[dict[str, Any]]]
    facts: dict[str, Any]


def make_world(
    folder: Path,
    settings: WorldSettings,
    paths: list[str],
    text_tokenizer: Callable[[], Any] = lambda: None,
    prefix: str = "",
) -> World:
    """Makes a world, or reads the parts of it that the folder contains.

    Args:
        folder (`Path`), settings ([`WorldSettings`])
        paths (`list[str]`), prefix (`str`): the text, see [`documents`].
        text_tokenizer (`Callable`): loads the tokenizer that decodes ids in the text. Only called if text is needed.

    Raises:
        ValueError: if the folder contains a world with other settings, or there is too little text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked = {**asdict(settings), "text": [Path(path).name for path in paths], "rows": prefix}
    known = folder / "world.json"
    if known.exists() and (found := json.loads(known.read_text())) != asked:
        raise ValueError(
            f"{folder} contains a world with {found}, but these settings are {asked}: give another --output."
        )
    known.write_text(json.dumps(asked, indent=2) + "\n")
    file = folder / "rows.json"
    if file.exists():
        tokenizer = _tokenizer(folder / "target", [], settings)
        target, facts = _target(folder / "target", tokenizer, [], [], settings)
        return World(target, tokenizer, json.loads(file.read_text()), facts)
    texts = documents(paths, text_tokenizer(), prefix)
    seen, kept = [text for text in texts if not held_out(text)], [text for text in texts if held_out(text)]
    tokenizer = _tokenizer(folder / "target", seen, settings)
    target, facts = _target(folder / "target", tokenizer, seen, kept, settings)
    generator = torch.Generator().manual_seed(0)
    rows = {
        "train": [
            *_answers(target, _prompts(tokenizer, seen, settings, 0, settings.answers), 0.0, settings, generator),
            *_answers(target, _prompts(tokenizer, seen, settings, 1, settings.answers), 1.0, settings, generator),
        ]
    }
    prompts = _prompts(tokenizer, kept, settings, 0, settings.held_out_answers)
    for temperature in (0.0, 1.0):
        rows[f"temperature_{temperature:g}"] = _answers(target, prompts, temperature, settings, generator)
    file.write_text(json.dumps(rows))
    return World(target, tokenizer, rows, facts)


def _tokenizer(folder: Path, texts: list[str], settings: WorldSettings) -> Any:
    if not (folder / "tokenizer.json").exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=settings.vocab_size,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        fast = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
        fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _target(folder: Path, tokenizer: Any, seen: list[str], kept: list[str], settings: WorldSettings) -> tuple:
    record = folder / "training.json"
    if not record.exists():
        torch.manual_seed(0)
        width = settings.hidden_size
        config = LlamaConfig(
            vocab_size=settings.vocab_size,
            hidden_size=width,
            intermediate_size=round(width * 2.75),
            num_hidden_layers=settings.num_layers,
            num_attention_heads=max(2, width // 64),
            num_key_value_heads=max(1, width // 128),
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BEGIN,
            eos_token_id=END,
        )
        target = LlamaForCausalLM(config)
        start = time.perf_counter()
        losses = _train(target, _blocks(tokenizer, seen, settings), settings)
        facts = {
            "parameters": sum(parameter.numel() for parameter in target.parameters()),
            "tokens": settings.target_tokens,
            "losses": losses,
            "held_out_loss": _loss(target, _blocks(tokenizer, kept, settings)[:64]),
            "seconds": round(time.perf_counter() - start),
        }
        target.save_pretrained(folder)
        record.write_text(json.dumps(facts, indent=2) + "\n")
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return target, json.loads(record.read_text())


def _blocks(tokenizer: Any, texts: list[str], settings: WorldSettings) -> torch.Tensor:
    """All documents concatenated, `[blocks, block + 1]`."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([token for document in encoded for token in (BEGIN, *document, END)])
    size = settings.block + 1
    return ids[: len(ids) // size * size].view(-1, size)


def _train(target: Any, blocks: torch.Tensor, settings: WorldSettings) -> list[float]:
    """Trains the target repeatedly over the blocks. Returns its loss at twenty points."""
    steps = max(1, settings.target_tokens // (settings.batch * settings.block))
    optimizer = torch.optim.AdamW(target.parameters(), settings.target_rate, betas=(0.9, 0.95), weight_decay=0.01)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20, 1.1 - step / steps))
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    losses, sums = [], []
    target.train()
    for step in range(steps):
        while len(order) < settings.batch:
            order += torch.randperm(len(blocks), generator=generator).tolist()
        batch, order = blocks[order[: settings.batch]], order[settings.batch :]
        logits = target(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(target.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        sums.append(loss.item())
        if len(sums) == max(1, steps // 20):
            losses.append(round(sum(sums) / len(sums), 4))
            print(f"target: step {step + 1} of {steps}, loss {losses[-1]:.3f}", flush=True)
            sums = []
    target.eval()
    return losses


@torch.no_grad()
def _loss(target: Any, blocks: torch.Tensor) -> float:
    logits = target(blocks[:, :-1], use_cache=False).logits
    return round(F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item(), 4)


def _prompts(tokenizer: Any, texts: list[str], settings: WorldSettings, place: int, count: int) -> torch.Tensor:
    """The first tokens of `count` documents, or the tokens after them (`place` 1), `[count, prompt]`."""
    size, first = settings.prompt_tokens - 1, place * (settings.prompt_tokens - 1)
    picked = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        if len(ids) >= first + size:
            picked.append([BEGIN, *ids[first : first + size]])
        if len(picked) == count:
            return torch.tensor(picked)
    raise ValueError(
        f"The text has {len(picked)} documents of {first + size} tokens, but {count} prompts are requested: give more --text, or "
        "request fewer answers."
    )


@torch.no_grad()
def _answers(
    target: Any, prompts: torch.Tensor, temperature: float, settings: WorldSettings, generator: torch.Generator
) -> list[dict[str, Any]]:
    """The target's own continuations, up to and including its end of a document."""
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    rows = []
    for batch in prompts.split(_ANSWER_BATCH):
        ids = target.generate(
            batch, attention_mask=torch.ones_like(batch), max_new_tokens=settings.answer_tokens, **sampling
        )
        for prompt, answer in zip(batch.tolist(), ids[:, batch.shape[1] :].tolist(), strict=True):
            end = answer.index(END) + 1 if END in answer else len(answer)
            if end >= 3:  # a drafter's first trained row predicts the answer's second token
                rows.append({"prompt_ids": prompt, "response_ids": answer[:end]})
    return rows


__all__ = ["World", "WorldSettings", "make_world"]
