"""The panel's sleep mode for vLLM; runs inside vLLM's own processes, see docs/fast-switch.md.

It needs the standard library, torch and vLLM, and nothing else of this project: `guard_files` copies the
folder as ``panel_sleep`` where a server's Python finds it, with the ``dist-info`` that makes it a plugin of
vLLM (entry point group ``vllm.general_plugins``). What of vLLM does not fit leaves vLLM's own sleep mode in
place.
"""
