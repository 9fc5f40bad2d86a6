"""Every key of the panel, once: bindings, footer, help and palette read this table."""

from __future__ import annotations

import msgspec
from textual.binding import Binding, BindingType


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """One key, what it does, and in what words."""

    key: str
    action: str
    short: str
    """For the footer."""
    help: str
    shown: str = ""
    """The key as people know it, if Textual calls it otherwise."""
    in_footer: bool = True
    named: str = ""
    """What it does to one model, `{}` for its name, if the palette offers it for each by name."""
    is_first: bool = False
    """Heeded before the widget in focus hears it; a letter is text all the same where text is typed.

    A slash would not be: Textual does not find its sign by its name, and takes it from who types it.
    """
    changes: bool = False
    """Whether it changes a server, or opens a port: a panel that only looks has no such key."""

    @property
    def cap(self) -> str:
        """The key for the eye."""
        return self.shown or self.key


KEYS: tuple[Key, ...] = (
    Key(
        key="enter",
        action="switch",
        short="switch",
        named="Switch to {}",
        help="Switch to the selected model",
        shown="⏎",
        changes=True,
    ),
    Key(
        key="s",
        action="sleep",
        short="sleep",
        named="Put {} to sleep",
        help="Put it to sleep at its level",
        changes=True,
    ),
    Key(
        key="0",
        action="sleep_at(0)",
        short="level 0",
        named="Put {} to sleep at level 0",
        help="Put it to sleep at level 0 (weights kept in VRAM)",
        in_footer=False,
        changes=True,
    ),
    Key(
        key="1",
        action="sleep_at(1)",
        short="level 1",
        named="Put {} to sleep at level 1",
        help="Put it to sleep at level 1 (weights kept in RAM)",
        in_footer=False,
        changes=True,
    ),
    Key(
        key="2",
        action="sleep_at(2)",
        short="level 2",
        named="Put {} to sleep at level 2",
        help="Put it to sleep at level 2 (weights read again)",
        in_footer=False,
        changes=True,
    ),
    Key(
        key="w",
        action="wake",
        short="wake",
        named="Wake {}",
        help="Wake it; others sleep first where it needs their room",
        changes=True,
    ),
    Key(key="u", action="start", short="start", named="Start {}", help="Start it", changes=True),
    Key(key="x", action="stop", short="stop", named="Stop {}", help="Stop it (asks)", changes=True),
    Key(
        key="r",
        action="restart",
        short="restart",
        named="Restart {}",
        help="Restart it (asks)",
        in_footer=False,
        changes=True,
    ),
    Key(
        key="U",
        action="start_all",
        short="start all",
        help="Start all models; one that cannot start is left out and named",
        in_footer=False,
        changes=True,
    ),
    Key(
        key="S",
        action="sleep_all",
        short="sleep all",
        help="Put all models to sleep",
        in_footer=False,
        changes=True,
    ),
    Key(
        key="X",
        action="stop_all",
        short="stop all",
        help="Stop all models (asks)",
        in_footer=False,
        changes=True,
    ),
    Key(
        key="c",
        action="chat",
        short="chat",
        named="Chat with {}",
        help="Chat with it; asleep, it is switched to first",
        is_first=True,
    ),
    Key(
        key="slash",
        action="find",
        short="find",
        help="Find models: only those whose name, source, state or GPU holds a text",
        shown="/",
    ),
    Key(
        key="f",
        action="reorder",
        short="order",
        help="Sort the models: by the config, state, GPU, VRAM, name",
        in_footer=False,
    ),
    Key(
        key="Y",
        action="copy_of",
        short="copy of",
        help="Copy its URL, pid, command line or the cause of its failure",
        in_footer=False,
    ),
    Key(key="n", action="events", short="events", help="What happened: failures, restarts, who did what"),
    Key(key="l", action="log", short="log", named="Show the log of {}", help="Follow its log"),
    Key(key="g", action="gpus", short="GPUs", help="The GPUs: figures, their course, processes"),
    Key(
        key="e",
        action="gateway",
        short="endpoint",
        help="One endpoint for every client: its address and requests, open and close it",
        in_footer=False,
        changes=True,
    ),
    Key(key="b", action="bench", short="bench", help="Measure the switches between two models", changes=True),
    Key(key="a", action="advice", short="advice", help="What to do with each model, and why"),
    Key(
        key="plus,equals_sign",
        action="zoom(1)",
        short="further",
        help="The timeline further back: 10 minutes, 1 hour, 6 hours, 24 hours",
        shown="+",
        in_footer=False,
    ),
    Key(
        key="minus",
        action="zoom(-1)",
        short="less far",
        help="The timeline less far back",
        shown="−",
        in_footer=False,
    ),
    Key(
        key="left",
        action="walk(-1)",
        short="earlier",
        help="The timeline's cursor: what was at a moment; one step back",
        shown="←",
        in_footer=False,
    ),
    Key(
        key="right",
        action="walk(1)",
        short="later",
        help="The timeline's cursor: one step on",
        shown="→",
        in_footer=False,
    ),
    Key(
        key="left_square_bracket",
        action="jump(-1)",
        short="before",
        help="The timeline's cursor to where the selected model's state changed before",
        shown="[",
        in_footer=False,
    ),
    Key(
        key="right_square_bracket",
        action="jump(1)",
        short="after",
        help="The timeline's cursor to where that state changed next",
        shown="]",
        in_footer=False,
    ),
    Key(key="t", action="app.theme", short="theme", help="Choose a theme", in_footer=False),
    Key(key="question_mark", action="help", short="help", help="This list", shown="?"),
    Key(key="q", action="quit_panel", short="quit", help="Quit (asks what becomes of running servers)"),
    Key(
        key="escape",
        action="back",
        short="back",
        in_footer=False,
        shown="esc",
        help="Leave the input; else put the timeline's cursor away; else stop the answer; else stop the "
        "operation at its next safe point (a start after a question); else show all models again",
    ),
    Key(
        key="z",
        action="chat_zoom",
        short="zoom",
        help="The chat over the whole screen, or beside the models again",
        in_footer=False,
    ),
    Key(
        key="d",
        action="duel",
        short="duel",
        help="Ask another model the last question, too, and see both answers side by side",
        in_footer=False,
    ),
    Key(
        key="D",
        action="side_by_side",
        short="compare",
        help="The last two answers to one question side by side",
        in_footer=False,
    ),
    Key(
        key="ctrl+n",
        action="chat_new",
        short="new",
        help="Begin a conversation; the one before is kept",
        shown="^n",
        in_footer=False,
    ),
    Key(
        key="h,ctrl+o",
        action="chat_list",
        short="talks",
        help="Conversations: find, go on, rename, export, delete",
        shown="h ^o",
        in_footer=False,
    ),
    Key(
        key="ctrl+g",
        action="chat_editor",
        short="editor",
        help="Write the question in $EDITOR",
        shown="^g",
        in_footer=False,
    ),
    Key(
        key="ctrl+r",
        action="chat_again",
        short="again",
        help="Ask the last question again, in place of its answer",
        shown="^r",
        in_footer=False,
    ),
    Key(
        key="ctrl+l",
        action="chat_edit",
        short="edit",
        help="Edit the last question and ask it in place of what was asked",
        shown="^l",
        in_footer=False,
    ),
    Key(
        key="ctrl+t",
        action="chat_go_on",
        short="go on",
        help="Have an answer that was cut gone on with",
        shown="^t",
        in_footer=False,
    ),
    Key(
        key="p,ctrl+s",
        action="chat_parameters",
        short="how to ask",
        help="How the model is asked: system prompt, temperature, seed, stop, JSON schema, presets",
        shown="p ^s",
        in_footer=False,
    ),
    Key(
        key="i",
        action="chat_chances",
        short="chances",
        help="How likely each token of the answer was, and what else might have stood there",
        in_footer=False,
    ),
    Key(
        key="y",
        action="copy_answer",
        short="copy",
        help="Copy what is selected, else its last answer",
        in_footer=False,
    ),
    Key(
        key="v",
        action="copy_code",
        short="copy code",
        help="Copy the code under the mouse, else the last that is seen",
        in_footer=False,
    ),
    Key(
        key="o",
        action="fold",
        short="reasoning",
        help="Show the last answer's reasoning, or hide it",
        in_footer=False,
    ),
)

ELSEWHERE: tuple[tuple[str, str], ...] = (
    ("↑ ↓ j k", "Select a model"),
    ("⏎", "In the chat's input: send (a pasted text keeps its lines)"),
    ("alt+⏎ ^j", "In the chat's input: begin a line"),
    ("PgUp PgDn", "In the chat's input: scroll what was said; ctrl+↑ ctrl+↓ by less"),
    ("ctrl+p", "Palette: every action by name"),
    ("tab", "Next part of the screen"),
)
"""Keys that widgets handle themselves."""


CHANGING = frozenset(key.action.partition("(")[0] for key in KEYS if key.changes)
"""The actions that a panel that only looks does not take."""


def keys_of(*, read_only: bool) -> list[Key]:
    """The keys that such a panel has."""
    return [key for key in KEYS if not (read_only and key.changes)]


def bindings() -> list[BindingType]:
    """The table as bindings of the dashboard."""
    return [Binding(key.key, key.action, key.short, show=False, priority=key.is_first) for key in KEYS]
