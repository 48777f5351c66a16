"""What is asked: the prompts of both demos, as token ids.

The texts are source files of Python's own library, which every machine has. The model has no vocabulary of
its own, so a word is a token: its checksum, modulo the vocabulary's size.
"""

from __future__ import annotations

import argparse
import inspect
import json.decoder
import logging
import re
import textwrap
import zlib
from collections.abc import Callable, Sequence

Send = Callable[[list[int]], list[int]]
"""Sends a prompt, returns the answer's tokens."""

DOCUMENTS = (json.decoder, textwrap, argparse)
QUESTIONS = (
    "What is this file for?",
    "Which classes does it define?",
    "Which function is the longest, and why?",
    "What happens with invalid input?",
    "Which parts are slow?",
    "What would you test first?",
    "Which names are public?",
    "How are options passed on?",
    "Where are errors raised?",
    "What does it import?",
    "Is it safe from several threads?",
    "Which comments are out of date?",
)
SYSTEM = "You are a careful engineer who reads files with tools, one step at a time, and says what you found. "
TOOLS = ("read_file", "search", "run_tests", "list_folder", "git_log", "open_issue")
TASKS = ("Find out why logging is slow.", "Explain how handlers find their formatter.", "List what locks protect.")
DOCUMENT_TOKENS, SYSTEM_TOKENS, RESULT_TOKENS = 900, 500, 120


def tokens(text: str, vocabulary: int) -> list[int]:
    """A token for each word and each sign; 0 to 2 are the model's own."""
    return [3 + zlib.crc32(word.encode()) % (vocabulary - 3) for word in re.findall(r"\w+|[^\w\s]", text)]


class Comparison:
    """Many questions about a few long documents: what chats with a file, and retrieval, do."""

    title = "Comparison"
    session = "document"

    def __init__(self, requests: int, vocabulary: int) -> None:
        count = min(len(DOCUMENTS), max(1, requests // 7))
        read = [tokens(inspect.getsource(module), vocabulary)[:DOCUMENT_TOKENS] for module in DOCUMENTS[:count]]
        # They go round the documents, so that none profits from being asked right before.
        asked = (QUESTIONS[number // count % len(QUESTIONS)] for number in range(requests))
        self.prompts = [read[number % count] + tokens(question, vocabulary) for number, question in enumerate(asked)]
        self.requests, self.first_turns = requests, set(range(count))
        self.about = f"{requests} questions about {count} documents of {DOCUMENT_TOKENS} tokens"

    def run(self, send: Send) -> None:
        for prompt in self.prompts:
            send(prompt)


class Agent:
    """Sessions with one system prompt that grow turn by turn. A prompt is only appended to, and the
    model's answers stay in it as the tokens that they were."""

    title = "Agent"
    session = "session"

    def __init__(self, requests: int, vocabulary: int) -> None:
        tools = (f"{tool}(path, options): returns text as JSON, at most {RESULT_TOKENS} words. " for tool in TOOLS)
        system = tokens(SYSTEM * 10 + "".join(tools) * 4, vocabulary)[:SYSTEM_TOKENS]
        self.opened = [system + tokens(task, vocabulary) for task in TASKS]
        source = tokens(inspect.getsource(logging), vocabulary)
        self.results = [source[start : start + RESULT_TOKENS] for start in range(0, len(source), RESULT_TOKENS)]
        self.requests, self.first_turns = requests, set(range(min(requests, len(TASKS))))
        self.about = f"{requests} turns of {len(TASKS)} sessions with one system prompt of {SYSTEM_TOKENS} tokens"

    def run(self, send: Send) -> None:
        sessions = [list(opened) for opened in self.opened]
        for request in range(self.requests):
            session = sessions[request % len(sessions)]
            if request >= len(sessions):
                session += self.results[request % len(self.results)]
            session += send(list(session))


def both(requests: Sequence[int], vocabulary: int) -> tuple[Comparison, Agent]:
    """Both demos, with so many requests each."""
    return Comparison(requests[0], vocabulary), Agent(requests[1], vocabulary)
