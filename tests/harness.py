"""lm-eval tasks whose data lie beside them, and nothing else that the harness knows."""

import functools
import json
from contextlib import contextmanager

import pytest
import yaml

WORDS = ["amber", "basil", "cedar", "delta", "ember", "flint", "grove", "hazel"]


@contextmanager
def only_own_tasks(cache):
    """Only the tests' own tasks: to read the thousands that the harness brings takes seconds.

    Args:
        cache: a folder for what `datasets` keeps.
    """
    import datasets
    import lm_eval.tasks

    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH"):
            patch.setattr(datasets.config, name, cache / name)
        own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
        patch.setattr(lm_eval.tasks, "TaskManager", own)
        yield patch


def write_task(root, name, documents, **config):
    data = root / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    given = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "doc_to_text": "{{text}}",
    }  # fmt: skip
    (root / f"{name}.yaml").write_text(yaml.safe_dump(given | config))


def small_tasks(root):
    """Three tasks of six documents: `choose` one of three words, `write` on, `read`. Every letter written counts."""
    documents = [
        {"text": " ".join(WORDS[n : n + 4]), "choices": [f" {WORDS[n - i]}" for i in range(3)], "gold": n % 3}
        for n in range(6)
    ]
    write_task(root, "choose", documents, output_type="multiple_choice", doc_to_choice="{{choices}}",
               doc_to_target="gold", num_fewshot=1, fewshot_split="test")  # fmt: skip
    letters = {"metric": "letters", "aggregation": "mean", "higher_is_better": False}
    write_task(root, "write", documents, output_type="generate_until", doc_to_target="",
               generation_kwargs={"until": ["z"], "max_gen_toks": 12}, metric_list=[letters])  # fmt: skip
    (root / "letters.py").write_text("def count(doc, results):\n    return {'letters': sum(map(ord, results[0]))}\n")
    with open(root / "write.yaml", "a") as file:
        file.write("process_results: !function letters.count\n")
    write_task(root, "read", documents, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
               metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}])  # fmt: skip
    return root
