"""Structured answers for clients: from the words of the API to a form that the engine follows."""

from typing import Any

from ..inference.session import FlashSloth
from ..inference.structured import AnswerForm, Grammar, compile_form

ANY_OBJECT = {"type": "object"}


class MakeGrammar:
    """Compiles what clients ask for.

    Args:
        session: whose tokenizer spells the answers.
    """

    def __init__(self, session: FlashSloth) -> None:
        self.session = session

    def __call__(self, kind: str, value: Any) -> Grammar:
        """A form.

        Args:
            kind: "choice", "regex", "json_object" or "json_schema".
            value: list of texts, regular expression, nothing, or schema.

        Raises:
            ValueError: the form is wrong or cannot be enforced.
        """
        forms: dict[str, dict[str, Any]] = {
            "choice": {"choices": value},
            "regex": {"regex": value},
            "json_object": {"schema": ANY_OBJECT},
            "json_schema": {"schema": value},
        }
        model = self.session.model
        return compile_form(AnswerForm(**forms[kind]), self.session.processor, model.generation_config)
