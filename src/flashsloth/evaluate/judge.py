"""The language model that scores free answers, at any URL that speaks OpenAI's protocol."""

from __future__ import annotations

import os

KEY_VARIABLE = "OPENAI_API_KEY"
DEFAULT_MODEL = "gpt-4o-2024-11-20"  # lmms-eval's own
NO_KEY = "none"  # servers of one's own ask for no key, their clients do


def use_judge(url: str | None, model: str) -> str:
    """Tell lmms-eval's tasks where the judge is, and ask it once.

    Args:
        url: base URL, such as http://localhost:8000/v1; None for no judge.
        model: its name there; the key is taken from $OPENAI_API_KEY.

    Returns:
        why there is no judge, in one line; an empty text where one answers.
    """
    os.environ.setdefault(KEY_VARIABLE, NO_KEY)
    if url is None:
        return "no judge: give --judge-url"
    os.environ |= {"API_TYPE": "openai", "OPENAI_API_URL": url, "MODEL_VERSION": model}
    try:
        from openai import OpenAI, OpenAIError
    except ImportError:
        return "no judge: pip install 'flashsloth[eval]' for its client"
    client = OpenAI(base_url=url, api_key=os.environ[KEY_VARIABLE], max_retries=1, timeout=60)
    try:
        client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Answer with one word: yes"}], max_tokens=8
        )
    except OpenAIError as error:
        return f"the judge at {url} does not answer: {' '.join(str(error).split())[:200]}"
    return ""
