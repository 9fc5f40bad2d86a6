"""An agent as MCP has them: one model decides, the other does, and a tool server of its own stands between.

    mcp_agent.py BASE PLANNER WORKER TURNS        the agent; a line of JSON at its end
    mcp_agent.py --tools BASE WORKER              the tool server, JSON-RPC by lines over its standard streams

The agent starts the tool server as a child, lists its tools, and gives them to the planner with each request.
What the planner calls (or says, where its server makes no tool calls) goes to the tool, which asks the worker
through the same gateway; its answer goes back to the planner.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import openai

TOOL = {
    "name": "do_step",
    "description": "Let the worker do one step.",
    "inputSchema": {
        "type": "object",
        "properties": {"step": {"type": "string", "maxLength": 20}},
        "required": ["step"],
    },
}
PROTOCOL = "2025-06-18"


def serve_tools(base: str, worker: str) -> None:
    """The tool server."""
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=300) as client:
        for line in sys.stdin:
            call = json.loads(line)
            if call["method"] == "initialize":
                result: dict[str, Any] = {"protocolVersion": PROTOCOL, "capabilities": {"tools": {}}}
                result["serverInfo"] = {"name": "worker", "version": "1"}
            elif call["method"] == "tools/list":
                result = {"tools": [TOOL]}
            else:
                step = call["params"]["arguments"]["step"]
                asked: Any = [{"role": "user", "content": f"Do this: {step}"}]
                done = client.chat.completions.create(model=worker, messages=asked, max_tokens=6)
                text = f"{done.model}: {done.choices[0].message.content}"
                result = {"content": [{"type": "text", "text": text}], "isError": False}
            print(json.dumps({"jsonrpc": "2.0", "id": call["id"], "result": result}), flush=True)


class Tools:
    """The agent's end of the tool server."""

    def __init__(self, base: str, worker: str) -> None:
        command = [sys.executable, __file__, "--tools", base, worker]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._last = 0
        self.call("initialize", protocolVersion=PROTOCOL, capabilities={}, clientInfo={"name": "agent"})

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One call and its result."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._last += 1
        line = {"jsonrpc": "2.0", "id": self._last, "method": method, "params": params}
        self._server.stdin.write(json.dumps(line) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        assert answer["id"] == self._last
        result: dict[str, Any] = answer["result"]
        return result

    def close(self) -> None:
        """End it."""
        self._server.communicate(timeout=30)


def run(base: str, planner: str, worker: str, turns: int) -> list[str]:
    """The loop; what the worker said in each turn."""
    tools, said = Tools(base, worker), []
    try:
        with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=300) as client:
            listed = tools.call("tools/list")["tools"]
            functions = [
                {
                    "type": "function",
                    "function": {
                        "name": tool["name"],
                        "description": tool["description"],
                        "parameters": tool["inputSchema"],
                    },
                }
                for tool in listed
            ]
            messages: list[Any] = [{"role": "user", "content": "Sort the list 3, 1, 2."}]
            for turn in range(turns):
                name, arguments, message = planned(
                    client, planner, messages[-4:], functions, streams=turn % 2 == 1
                )
                result = tools.call("tools/call", name=name, arguments=arguments)
                text = result["content"][0]["text"]
                said.append(text)
                messages += [*message, {"role": "user", "content": f"It said: {text[:40]}. And now?"}]
    finally:
        tools.close()
    return said


def planned(
    client: openai.OpenAI, model: str, messages: list[Any], functions: list[Any], *, streams: bool
) -> tuple[str, dict[str, str], list[Any]]:
    """What the planner calls: a tool, its arguments, and the messages to remember it by."""
    asked: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "max_tokens": 60,
        "temperature": 0,
        "tools": functions,
        "tool_choice": {"type": "function", "function": {"name": functions[0]["function"]["name"]}},
    }
    if streams:
        text, called = "", ""
        for delta in deltas(client.chat.completions.create(**asked, stream=True)):
            text += delta.content or ""
            called += "".join(
                call.function.arguments or "" for call in delta.tool_calls or () if call.function
            )
    else:
        answer = client.chat.completions.create(**asked)
        assert answer.model == model
        text = answer.choices[0].message.content or ""
        called = "".join(call.function.arguments for call in answer.choices[0].message.tool_calls or ())
    name = functions[0]["function"]["name"]
    arguments = None
    with contextlib.suppress(ValueError):  # no tool call, or one that its token limit cut off
        arguments = json.loads(called)
    if not isinstance(arguments, dict) or not isinstance(arguments.get("step"), str):
        arguments = {"step": (called or text)[:20]}  # small models call what there is not
    return name, arguments, [{"role": "assistant", "content": f"{name}({json.dumps(arguments)})"}]


def deltas(stream: Any) -> Iterator[Any]:
    """The pieces of a streamed answer."""
    for chunk in stream:
        for choice in chunk.choices:
            yield choice.delta


if __name__ == "__main__":
    if sys.argv[1] == "--tools":
        serve_tools(*sys.argv[2:4])
    else:
        print(json.dumps(run(*sys.argv[1:4], int(sys.argv[4]))))
