"""Answers of exported models beside those of PyTorch, on held-out drawn images: equal ones, exact match, megabytes.

    python benchmarks/exported_answers.py nano nano-float32 nano-int8 --questions 500 --json answers.json

The folders were written by `flashsloth export nano ...`. One question of every image is asked, by itself. A folder
whose exact match is more than a point below PyTorch's is marked.
"""

import argparse
import json
import sys
from pathlib import Path

from common import machine

import flashsloth_edge
from flashsloth.inference import load
from flashsloth.synthetic import SyntheticDataset, exact_match

MOST_LOST = 0.01
NEW_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what the folders were exported from")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    asked = []
    dataset = SyntheticDataset("test", size=arguments.questions, seed=1)
    for index in range(arguments.questions):
        sample = dataset.sample(index)
        turn = sample.turns[index % len(sample.turns)]
        asked.append((sample.image, turn.question, turn.answer))
    original = load(arguments.model, device="cpu", kernels="torch")
    expected = [original.ask(image, question, max_new_tokens=NEW_TOKENS).text for image, question, _ in asked]
    correct = sum(exact_match(text, answer) for text, (_, _, answer) in zip(expected, asked, strict=True))
    rows = [{"folder": "torch", "correct": correct, "questions": len(asked)}]
    for folder in arguments.folders:
        exported = flashsloth_edge.load(folder)
        texts = [exported.ask(image, question, max_new_tokens=NEW_TOKENS).text for image, question, _ in asked]
        found = sum(exact_match(text, answer) for text, (_, _, answer) in zip(texts, asked, strict=True))
        rows.append(
            {
                "folder": folder.name,
                "weights": exported.manifest.weights,
                "megabytes": round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6, 1),
                "equal": sum(text == other for text, other in zip(texts, expected, strict=True)),
                "correct": found,
                "questions": len(asked),
                "loses": found < correct - MOST_LOST * len(asked),
            }
        )
        print(rows[-1], flush=True)
    report = {"machine": machine(), "rows": rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    json.dump(rows, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
