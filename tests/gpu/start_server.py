"""A server on the first GPU, for scripts whose worker is PyTorch's process itself."""
import re
import subprocess


def start_server(program, arena):
    """Its process, address and admin address."""
    process = subprocess.Popen(
        [program, "--device=cuda:0", "--listen=127.0.0.1:0", "--admin_listen=127.0.0.1:0",
         f"--arena_bytes={arena}"], stdout=subprocess.PIPE, text=True)
    match = re.match(r"listening on (\S+), admin on (\S+)", process.stdout.readline())
    if match is None:
        raise RuntimeError("the server did not start")
    return process, match[1], match[2]
