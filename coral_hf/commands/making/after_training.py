"""The last stage of `coral-hf train`: measures which draft size pays, and saves it with the drafter."""

from pathlib import Path
from typing import Any

from ...data.chat import with_template_kwargs
from ...data.prompts import Prompt
from ...drafter.modeling_coral import CoralDraftModel


PROMPTS = 8
# A CPU takes minutes to read longer prompts, so shorter ones are preferred.
LONG_PROMPT = 1024
MAX_NEW_TOKENS = 64


def tune_trained(trainer: Any) -> None:
    """Tunes the drafter in a trainer's output folder on held-out conversations, and saves the best size in its config.

    After a training with several processes or without held-out conversations, prints the command to run instead.

    Args:
        trainer ([`CoralTrainer`]): a trainer after `save_model`.
    """
    if not trainer.is_world_process_zero():
        return
    from ...hub.records import RECORD_FOLDER

    folder = Path(trainer.args.output_dir)
    prompts = held_out_prompts(trainer.eval_dataset, trainer.adapter.text_config)
    if trainer.args.world_size > 1 or not prompts:
        reason = "several processes trained it" if trainer.args.world_size > 1 else "nothing was held out"
        print(
            f"The draft size was not tuned ({reason}): coral-hf tune --drafter {folder} --target TARGET --data PROMPTS "
            f"--output {folder / RECORD_FOLDER} --save true"
        )
        return
    tokenizer = with_template_kwargs(trainer.processing_class, trainer.args.chat_template_kwargs)
    print(f"Measuring which draft size pays on this machine, on {len(prompts)} held-out conversations.", flush=True)
    tune_folder(folder, trainer.target_model, tokenizer, prompts)


def tune_folder(folder: Path, target: Any, tokenizer: Any, prompts: list[Prompt]) -> dict[str, Any]:
    """Measures which draft size pays. Saves it in a drafter's config, and the record next to its weights.

    Args:
        folder (`Path`): folder of the drafter.
        target (`PreTrainedModel`), tokenizer, prompts (`list[Prompt]`)

    Returns:
        `dict`: the saved settings.
    """
    from ...evaluation.tune import chosen_settings, save_settings, slower_than_plain, tune, write_record
    from ...generation.settings import DraftSettings
    from ...hub.model_card import write_card
    from ...hub.records import RECORD_FOLDER

    drafter = CoralDraftModel.from_pretrained(folder, dtype=target.dtype).eval().to(target.device)
    box = DraftSettings(draft_depth=8, draft_top_k=4, draft_total_tokens=32)
    record = tune(target, tokenizer, drafter, prompts, box, MAX_NEW_TOKENS)
    write_record(record, folder / RECORD_FOLDER)
    settings = chosen_settings(record)
    save_settings(folder, settings)
    write_card(folder, unmeasured=True, strict=False)
    shown = {name: value for name, value in settings.items() if name != "draft_calibration"}
    print(f"Draft size saved in {folder / 'config.json'}: {', '.join(f'{name}={shown[name]}' for name in shown)}.")
    if (warning := slower_than_plain(record)) is not None:
        print(warning)
    return shown


def held_out_prompts(dataset: Any, text_config: Any) -> list[Prompt]:
    """The first prompts of encoded conversations, as token ids.

    Args:
        dataset ([`ConversationDataset`], *optional*), text_config (`PreTrainedConfig`): the target's.

    Returns:
        `list[Prompt]`: at most eight, each short enough for an answer within the target's positions.
    """
    if dataset is None or isinstance(dataset, dict):
        return []
    positions = getattr(text_config, "max_position_embeddings", None)
    found = []
    for index in range(len(dataset)):
        item = dataset[index]
        length = int(item["response_mask"].nonzero()[0])
        if length and (positions is None or length + MAX_NEW_TOKENS <= positions):
            ids = tuple(item["input_ids"][:length].tolist())
            found.append(Prompt(f"held-out-{index}", "held_out", (), ids=ids))
    short = [prompt for prompt in found if len(prompt.ids or ()) <= LONG_PROMPT]
    return (short or found)[:PROMPTS]


__all__ = ["held_out_prompts", "tune_folder", "tune_trained"]
