"""Renders conversations with a model's chat template, as transformers does.

Templates are programs from model repos: they run in Jinja's sandbox, with a limit on their time and one on their
output. Their memory has no limit but that of the process, so they are compiled and rendered under confinement. A timer
ends a loop without output; it needs the main thread of its process.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from headrace_chassis.confined.limits import Limits
from headrace_chassis.confined.ports import Confinement, Talk
from headrace_chassis.errors import ParsersBusy, ServiceError
from headrace_extractor.corpora.chat_template import ChatTemplate
from headrace_extractor.corpora.files import contents
from headrace_extractor.corpora.files.contents import malformed, too_large
from headrace_extractor.errors import CorpusMalformed, ModelUnsupported, RunnerLost

# Published templates take milliseconds.
RENDER_DEADLINE_S = 4.0
_LIMITS = Limits(memory_bytes=1024**3, cpu_s=6, wall_s=30.0, output_bytes=256 * 1024 * 1024)
# Rows must not depend on the day they are made. A template that asks whether a date is defined is told that there is
# none, and writes the date it was made with. Every other template gets this date, the default of Llama's templates.
_DATE = datetime(2024, 7, 26, tzinfo=UTC)
_ASKS_FOR_DATE = re.compile(r"strftime_now\s+is\s+(not\s+)?(un)?defined")
# Keys under which messages carry a model's reasoning: the first that is set counts.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatRenderer:
    """Writes conversations as text; raises ModelUnsupported if the template can't be compiled."""

    def __init__(self, template: ChatTemplate) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            optimized=False,
        )
        environment.code_generator_class = _Unfolded
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "dict": _Dict(), "namespace": _Namespace}
        del environment.globals["lipsum"]  # Random text.
        if not _ASKS_FOR_DATE.search(template.source):
            environment.globals["strftime_now"] = _DATE.strftime
        self._special_tokens = dict(template.special_tokens)
        try:
            self._template = environment.from_string(template.source)
        except Exception as exc:  # A program: Jinja makes Python of it, which fails in any way.
            why = f"{type(exc).__name__}: {exc}"[:300]
            raise ModelUnsupported(f"The model's chat template can't be compiled: {why}.") from exc

    def render(self, messages: Sequence[Mapping[str, Any]], document: int) -> str:
        """Returns the text of a conversation; raises CorpusMalformed if the template refuses it or fails on it."""
        given: list[Mapping[str, Any]] = []
        parts: list[str] = []
        size = 0
        try:
            for told in messages:
                # transformers leaves keys without a value out: templates handle absent ones, and would write "None".
                message = {name: value for name, value in told.items() if value is not None}
                reasoning = next((message[name] for name in _REASONING if name in message), None)
                # Some templates read `thinking`, others `reasoning_content`.
                given.append(
                    message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
                )
            with _deadline(RENDER_DEADLINE_S):
                for part in self._template.generate(
                    messages=given, tools=None, documents=None, add_generation_prompt=False, **self._special_tokens
                ):
                    size += len(part)
                    if size > contents.MAX_DOCUMENT_BYTES:
                        raise too_large(f"Document {document} as the chat template writes it", document=document)  # noqa: TRY301
                    parts.append(part)
            return "".join(parts)
        except jinja2.TemplateError as exc:
            raise malformed(
                f"The model's chat template refuses document {document}: {str(exc)[:300]}; leave the conversation"
                " out, or write it as the template wants it.",
                document=document,
            ) from exc
        except ServiceError:
            raise
        except MemoryError as exc:
            raise malformed(
                f"Document {document} as the chat template writes it takes more memory than a conversation may; leave"
                " it out, or mend the template.",
                document=document,
            ) from exc
        except Exception as exc:
            raise malformed(
                f"The model's chat template fails on document {document} ({type(exc).__name__}: {str(exc)[:300]}); it"
                " may want other keys in its messages.",
                document=document,
            ) from exc


class ConfinedRenderer:
    """Writes conversations as text under confinement, as a ChatRenderer does.

    Raises ModelUnsupported for a template that can't be compiled, and CorpusMalformed for a conversation that the
    template refuses or that takes more than the limits; the next one may be written all the same. Raises RunnerLost
    if the child is lost by accident, so that no row depends on how busy the machine is.
    """

    def __init__(self, template: ChatTemplate, confinement: Confinement) -> None:
        self._job = {"source": template.source, "special_tokens": dict(template.special_tokens)}
        self._confinement = confinement
        self._document = 0
        self._talk: Talk | None = None
        self._stack = ExitStack()

    def render(self, messages: Sequence[Mapping[str, Any]], document: int) -> str:
        """Returns the text of a conversation; raises CorpusMalformed, and RunnerLost if trying again may help."""
        self._document = document
        try:
            if self._talk is None:
                opened = self._confinement.open(render_each, self._job, refuse=self._refuse, limits=_LIMITS)
                talk = self._stack.enter_context(opened)
                talk.ask(None)  # Compiles the template: from here on, a conversation is at fault.
                self._talk = talk
            told = self._talk.ask([messages, document])
        except ParsersBusy as exc:
            self.close()
            message = f"Document {document} was not written by the chat template: {exc.message}"
            raise RunnerLost(message, metadata={"document": str(document)}, retry_after_s=exc.retry_after_s) from exc
        except ServiceError:
            self.close()
            raise
        if "text" in told:
            text: str = told["text"]
            return text
        raise CorpusMalformed(told["message"], metadata=told["metadata"])

    def close(self) -> None:
        """Ends the conversation with the child; the next document begins another."""
        self._talk = None
        self._stack.close()

    def _refuse(self, why: str) -> ServiceError:
        if self._talk is None:
            return ModelUnsupported(f"The model's chat template {why}; take it from the model's own repo.")
        return malformed(
            f"Document {self._document} as the chat template writes it {why}; leave the conversation out.",
            document=self._document,
        )


def render_each(source: str, special_tokens: dict[str, str]) -> Generator[Any, Any, None]:
    """Answers each `[messages, document]` with a text, or with the error that the template makes of it."""
    renderer = ChatRenderer(ChatTemplate(source, special_tokens))
    question = yield None
    answer: dict[str, Any] = {}
    while True:
        if question is not None:
            try:
                answer = {"text": renderer.render(*question)}
            except CorpusMalformed as exc:
                answer = {"message": exc.message, "metadata": exc.metadata}
        question = yield answer


class _Unfolded(CodeGenerator):
    """Leaves constant expressions to the rendering: while Jinja compiles, no timer would end them."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part of the text; here it is text like any other."""

    tags = {"generation"}  # noqa: RUF012 -- as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_whole"), [], [], body).set_lineno(line)

    def _whole(self, caller: Macro) -> str:
        return str(caller())


class _Dict:
    """`dict(...)` for templates, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        """Does the same as `dict.fromkeys`."""
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """`namespace(...)` for templates, without names that start with an underscore: Python keeps them for itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args  # No parameter `self`: a template may use that name for a value of its own.
        values = dict(*given, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} starts with an underscore")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Writes JSON as transformers does; Jinja's own filter would escape characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raises ModelUnsupported in a block that takes longer; does nothing in threads other than the main one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise ModelUnsupported(
            f"The model's chat template took longer than {seconds:.0f} s for one conversation; mend the template."
        )

    before: Callable[[int, FrameType | None], Any] | int | None = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
