"""litellm before a gateway, in a process of its own: `use_litellm.py BASE A B`; a line of JSON at its end.

Of its own, as litellm changes what a program warns of, and asks for prices on the net unless told not to.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import httpx
import litellm

ASKED = [{"role": "user", "content": "The capital of France is"}]


def openai_way(base: str, model: str) -> dict[str, Any]:
    return {"model": f"openai/{model}", "api_base": f"{base}/v1", "api_key": "none", "messages": ASKED}


async def use(base: str, names: list[str]) -> dict[str, Any]:
    """Each model whole and streamed, by OpenAI's way and by Anthropic's; then broken off, both ways."""
    found: dict[str, Any] = {"whole": [], "streamed": [], "anthropic": []}
    for name in (*names, names[0]):
        same = openai_way(base, name) | {"max_tokens": 6, "temperature": 0, "num_retries": 0}
        whole = await litellm.acompletion(**same)
        found["whole"].append([whole.model, whole.choices[0].message.content])
        stream = await litellm.acompletion(**same, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        found["streamed"].append("".join(pieces))
    message = await litellm.acompletion(
        model=f"anthropic/{names[1]}", api_base=base, api_key="none", messages=ASKED, max_tokens=6
    )
    found["anthropic"] = message.choices[0].message.content
    endless = openai_way(base, names[0]) | {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    task = asyncio.ensure_future(litellm.acompletion(**endless))
    async with httpx.AsyncClient() as client:
        while not task.done() and not (await client.get(f"{base}/running")).json()["requests"]:
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    found["broken off"] = task.cancelled()

    async def read() -> None:
        async for _ in await litellm.acompletion(**endless, stream=True):
            heard.set()

    heard = asyncio.Event()
    reading = asyncio.ensure_future(read())
    await asyncio.wait_for(heard.wait(), 60)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    try:
        await litellm.acompletion(**openai_way(base, "nobody"))
    except litellm.NotFoundError as error:
        found["unknown"] = "does not exist" in str(error)
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(use(sys.argv[1], sys.argv[2:4]))))
