"""The page: a chat about images, with a map of attention beside each answer."""

from __future__ import annotations

import hmac
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio
import jinja2
from fastapi import FastAPI
from PIL import Image

from ..checkpoints.hub import ASSETS
from ..inference.explanation import Explanation
from ..model.image_loading import load_image
from ..serve.settings import Settings
from .sources import Cost, Source, Turn

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SAMPLES = ASSETS / "samples"
MODELS_OWN = "the model's own"
REFUSED = "That did not work"
SIMULTANEOUS = 32  # answers that the page waits for at once; the engine has limits of its own
ABOUT = (
    "Ask about one or several images. A map shows where a model's attention went, which need not be why it answered "
    "as it did. Measured with nano on drawn images (`flashsloth explain-check`), the language model's map points at "
    "what was asked about far more often than EmbQ's, and SAP's is the same for every question."
)


@dataclass(frozen=True)
class _Answered:
    """A turn with what is shown beside its answer."""

    turn: Turn
    beside: str


@dataclass(frozen=True)
class _Chat:
    """Turns about some images, which other images end."""

    files: tuple[str, ...] = ()
    answered: tuple[_Answered, ...] = ()


class Page:
    """What the page's events do.

    Args:
        source: of the answers.
        settings: limits on images.
    """

    def __init__(self, source: Source, settings: Settings) -> None:
        self.source, self.settings = source, settings
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(FOLDER), undefined=jinja2.StrictUndefined, autoescape=True
        )
        self._beside = environment.get_template("answer.html.jinja")

    def load(self, files: Sequence[tuple[str, Any]] | None) -> list[Image.Image]:
        """The images of the gallery.

        Raises:
            ValueError: one that cannot be used, or too many.
        """
        settings = self.settings
        if len(files or ()) > settings.max_images:
            raise ValueError(f"That are {len(files or ())} images; at most {settings.max_images} go together.")
        images = []
        for path, _ in files or ():
            try:
                images.append(
                    load_image(
                        Path(path),
                        max_pixels=settings.max_pixels,
                        max_bytes=settings.max_image_bytes,
                        alpha_background=settings.alpha_background,
                    )
                )
            except (ValueError, OSError) as error:
                message = str(error).replace(str(path), Path(path).name)
                raise ValueError(f"{Path(path).name} cannot be used: {message}") from error
        return images

    def check(self, files: Sequence[tuple[str, Any]] | None) -> Any:
        """Take files out of the gallery that cannot be used, with a message."""
        good = []
        for file in files or ():
            try:
                self.load([file])
                good.append(file)
            except ValueError as error:
                gradio.Warning(str(error), title=REFUSED)
        if len(good) > self.settings.max_images:
            gradio.Warning(f"Only the first {self.settings.max_images} images are kept.")
            good = good[: self.settings.max_images]
        return gradio.skip() if len(good) == len(files or ()) else [path for path, _ in good] or None

    def ask(
        self,
        question: str,
        files: Sequence[tuple[str, Any]] | None,
        model: str,
        tokens: str,
        chat: _Chat,
    ) -> Iterator[tuple[Any, ...]]:
        """Stream the answer: (text box, messages, chat). What is wrong is told in a message, and changes nothing."""
        names = tuple(path for path, _ in files or ())
        chat = chat if chat.files == names else _Chat(names)
        try:
            if not question.strip():
                raise ValueError("Write a question first.")
            yield from self._ask(question.strip(), self.load(files), model, tokens, chat)
        except (ValueError, OSError) as error:
            gradio.Warning(str(error), title=REFUSED)
            yield question, self.show(chat), gradio.skip()

    def _ask(
        self, question: str, images: list[Image.Image], model: str, tokens: str, chat: _Chat
    ) -> Iterator[tuple[Any, ...]]:
        started = time.perf_counter()
        visual_tokens = None if tokens == MODELS_OWN else int(tokens)
        turns = [*(each.turn for each in chat.answered), Turn(question)]
        text, cost, first_words = "", Cost(), None
        for piece in self.source.answer(model, images, turns, visual_tokens):
            if isinstance(piece, Cost):
                cost = piece
                continue
            first_words = first_words or time.perf_counter() - started
            text += piece
            yield "", self.show(chat, Turn(question, text)), gradio.skip()
        turn = Turn(question, text.strip())
        words = _cost_in_words(cost, first_words)
        turns[-1] = turn
        yield "", self.show(chat, turn), gradio.skip()
        beside = self._beside_answer(words, self._explanation(model, images, turns, visual_tokens))
        chat = _Chat(chat.files, (*chat.answered, _Answered(turn, beside)))
        yield "", self.show(chat), chat

    def _explanation(
        self, model: str, images: Sequence[Image.Image], turns: Sequence[Turn], visual_tokens: int | None
    ) -> Explanation | None:
        try:
            return self.source.explain(model, images, turns, visual_tokens)
        except ValueError as error:  # the answer stands all the same
            logger.warning("no map: %s", error)
            gradio.Warning(f"There is no map: {error}")
            return None

    def _beside_answer(self, cost: str, explanation: Explanation | None) -> str:
        page = None if explanation is None else explanation.page()
        question = "" if explanation is None else explanation.question
        return self._beside.render(cost=cost, page=page, question=question)

    def show(self, chat: _Chat, under_way: Turn | None = None) -> list[dict[str, Any]]:
        """The messages of a chat."""
        messages: list[dict[str, Any]] = []
        for each in chat.answered:
            messages += [
                {"role": "user", "content": each.turn.question},
                {"role": "assistant", "content": each.turn.answer or "(nothing)"},
                {"role": "assistant", "content": gradio.HTML(each.beside)},
            ]
        if under_way is not None:
            messages.append({"role": "user", "content": under_way.question})
            messages.append({"role": "assistant", "content": under_way.answer or "..."})
        return messages

    def choices(self, model: str) -> Any:
        """The numbers of visual tokens of a model."""
        return gradio.update(choices=[MODELS_OWN, *map(str, self.source.token_choices(model))], value=MODELS_OWN)


def _cost_in_words(cost: Cost, first_words: float | None) -> str:
    parts = []
    if cost.visual_tokens is not None:
        instead = "" if cost.uncompressed_tokens is None else f" instead of {cost.uncompressed_tokens}"
        parts.append(f"{cost.visual_tokens} visual tokens{instead}")
    if first_words is not None:
        parts.append(f"first words after {1000 * first_words:.0f} ms")
    parts += [f"{stage} {1000 * seconds:.1f} ms" for stage, seconds in cost.seconds.items()]
    if cost.is_cut:
        parts.append("cut at its longest")
    return " · ".join(parts)


def build(source: Source, settings: Settings) -> gradio.Blocks:
    """The page as gradio's blocks.

    Raises:
        OSError: the models of a server cannot be read.
    """
    page = Page(source, settings)
    models = source.models()
    samples = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))
    with gradio.Blocks(title="FlashSloth", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# FlashSloth\n{ABOUT}")
        state = gradio.State(_Chat())
        with gradio.Row():
            with gradio.Column(scale=2, min_width=280):
                gallery = gradio.Gallery(
                    label="Images: drop, paste, choose or photograph them",
                    sources=["upload", "clipboard", "webcam"],
                    type="filepath",
                    file_types=["image"],
                    columns=2,
                    height=260,
                    object_fit="contain",
                    interactive=True,
                    elem_id="flashsloth-images",
                )
                model = gradio.Dropdown(models, value=models[0], label="Model", interactive=len(models) > 1)
                tokens = gradio.Dropdown(
                    [MODELS_OWN, *map(str, source.token_choices(models[0]))],
                    value=MODELS_OWN,
                    label="Visual tokens of an image",
                    elem_id="flashsloth-tokens",
                )
                gradio.Markdown("Examples")
                examples = [
                    (gradio.Button(f"{sample['image'].split('.')[0]}: {sample['question']}", size="sm"), sample)
                    for sample in samples
                ]
            with gradio.Column(scale=3, min_width=300):
                chat = gradio.Chatbot(
                    label="Answers",
                    height=720,
                    render_markdown=False,
                    group_consecutive_messages=True,
                    buttons=["copy"],
                    elem_id="flashsloth-chat",
                    placeholder="Add an image, or take an example, and ask.",
                )
                question = gradio.Textbox(
                    label="Question",
                    placeholder="what is in the picture?",
                    autofocus=True,
                    lines=1,
                    max_lines=4,
                    elem_id="flashsloth-question",
                )
                with gradio.Row():
                    ask = gradio.Button("Ask", variant="primary", elem_id="flashsloth-ask")
                    stop = gradio.Button("Stop")
                    anew = gradio.Button("New chat")
        inputs, outputs = [question, gallery, model, tokens, state], [question, chat, state]
        asking = gradio.on(
            [ask.click, question.submit], page.ask, inputs, outputs, show_progress="hidden", api_name=False
        )
        stop.click(None, cancels=[asking], api_name=False)
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_name": False}
        anew.click(lambda: ([], _Chat()), None, [chat, state], cancels=[asking], **quiet)
        gallery.upload(page.check, gallery, gallery, **quiet)
        model.change(page.choices, model, tokens, **quiet)
        for button, sample in examples:
            path = str(SAMPLES / sample["image"])
            button.click(lambda path=path, text=sample["question"]: ([path], text), None, [gallery, question], **quiet)
    blocks.queue(default_concurrency_limit=SIMULTANEOUS)
    return blocks


def mount_page(app: FastAPI, source: Source, settings: Settings) -> FastAPI:
    """Put the page on an application at "/". Where the server has keys, the page asks for one of them.

    Args:
        app: its own routes come first.
        source: of the answers.
        settings: of the server: keys, and limits on images.
    """

    def is_key(_user: str, key: str) -> bool:
        known = [hmac.compare_digest(key.encode(), own.encode()) for own in settings.api_keys]  # all, in equal time
        return any(known)

    gradio.mount_gradio_app(
        app,
        build(source, settings),
        path="/",
        footer_links=[],
        run_history=False,
        auth=is_key if settings.api_keys else None,
        auth_message="Any name, and an API key of this server as the password.",
        allowed_paths=[str(SAMPLES)],
        max_file_size=settings.max_image_bytes,
        show_error=True,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css_paths=[FOLDER / "page.css"],
        ssr_mode=False,
        pwa=False,
    )
    # open pages hold a connection, which would keep the server from stopping
    app.state.at_stop = [app.routes[-1].app.stop_event.set]  # type: ignore[attr-defined]
    return app
