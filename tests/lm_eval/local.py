"""What the tests of the harness evaluate: tasks of every output type over JSON lines, and small models
of transformers with a tokenizer of their own, without network."""

import json
import random
from pathlib import Path

import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megaarch.interchange.convert import Conversion, convert
from tests.tiny_transformers import build

NAMES = ("river", "stone", "garden", "letter", "window", "forest", "market", "winter")
VERBS = ("carries", "finds", "opens", "follows", "keeps", "watches")
LENGTH = 192  # positions
FAMILIES = ("gpt2", "llama", "t5")
TASKS = ("local_choice", "local_word", "local_rolling", "local_answer")


def _sentence(rng: random.Random) -> str:
    return f"The {rng.choice(NAMES)} {rng.choice(VERBS)} the {rng.choice(NAMES)}"


def write_tasks(folder: Path, items: int = 6) -> Path:
    """One task of each output type, with items to take examples from."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for split, number in (("train", 8), ("test", items)):
        lines = []
        for _ in range(number):
            text = _sentence(rng)
            choices = [text.rsplit(" ", 1)[1], *rng.sample(VERBS, 2), "a long walk by the sea"]
            # several windows of a model, an empty context in the first
            long = ". ".join(_sentence(rng) for _ in range(40))
            question = text.rsplit(" ", 1)[0]
            item = {"question": question, "choices": choices, "label": 0, "long": long}
            lines.append(json.dumps(item))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "training_split": "train",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[label]}}",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    own = {
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "metric_list": [{"metric": name, **mean} for name in ("acc", "acc_norm")],
        },
        "local_word": {"output_type": "loglikelihood", "metric_list": [{"metric": "acc", **mean}]},
        "local_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{long}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "local_answer": {
            "output_type": "generate_until",
            "generation_kwargs": {"until": ["\n", " a", "ch"], "max_gen_toks": 24},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
    }
    for name, task in own.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | task))
    return folder


def _tokenizer(family: str) -> Tokenizer:
    """Byte-level BPE, with the template of its family: bos ahead (Llama), eos behind (T5), nothing."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(1)
    made.train_from_iterator((_sentence(rng) for _ in range(300)), trainer)
    single = {"llama": "<s> $A", "t5": "$A </s>"}.get(family)
    if single:
        special = [("<s>", 1), ("</s>", 2)]
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return made


def _model(family: str, size: int) -> transformers.PreTrainedModel:
    torch.manual_seed(7)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": size}
    model = build(family, LENGTH, 0, **ids)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15 if family == "t5" else 0.3)
    return model.eval()


def write_pair(family: str, place: Path) -> tuple[Path, Path]:
    """A model's Hugging Face folder, and the run that it converts to."""
    folder, run = place / f"{family}-hf", place / family
    tokenizer = _tokenizer(family)
    model = _model(family, tokenizer.get_vocab_size())
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=LENGTH,
    ).save_pretrained(folder)
    convert(Conversion(folder, run, "checkpoint", sentinels=2, verify=False))
    return folder, run
