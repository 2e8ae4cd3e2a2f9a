"""A python that has torch and transformers loaded already, for tests that start dozens of stages:
three seconds less for each.

    with warm_python(folder) as python: subprocess.run([python, "evaluate.py", ...])

`python` is a small client of a server that forks itself for every call: same script, arguments,
folder, environment, standard streams, signals and exit code as with a fresh interpreter, and
nothing of the project's is loaded before. With PYTHON_EXEC=python
torchrun's ranks are such, too."""

import contextlib, json, os, runpy, select, signal, socket, subprocess, sys
from pathlib import Path

CLIENT = '''#!{python} -SE
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    child = int.from_bytes(server.recv(4, socket.MSG_WAITALL), "big")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(child, number))
    code = int.from_bytes(server.recv(2, socket.MSG_WAITALL), "big", signed=True)
if code < 0:  # ended by a signal: so do we
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
'''


@contextlib.contextmanager
def warm_python(folder):
    path, client = str(Path(folder, "warm.sock")), Path(folder, "warm_python")
    client.write_text(CLIENT.format(python=sys.executable, path=path))
    client.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, __file__, path],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert server.stdout.readline() == b"ready\n"
    try:
        yield str(client)
    finally:
        server.kill()
        server.wait()


def serve(path):
    import importlib
    import transformers

    for name in ("anthropic", "torch.distributed.checkpoint", "torch.distributed.fsdp",
                 "torch.distributed.elastic.multiprocessing.errors",
                 "torch.distributed.launcher.api"):
        importlib.import_module(name)

    for name in (
        "AutoModelForCausalLM",
        "AutoModelForTokenClassification",
        "AutoTokenizer",
        "LlamaForCausalLM",
        "LlamaForTokenClassification",
        "LlamaTokenizer",
    ):
        getattr(transformers, name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the handlers
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            handle(connection)
            os._exit(0)
        connection.close()


def handle(connection):
    """One call: the child runs it; here its end is told to the client, and the client's end is the
    child's"""
    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    words, cwd, env = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    child = os.fork()
    if child == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        run(words, cwd, env)
    for stream in streams:
        os.close(stream)
    connection.sendall(child.to_bytes(4, "big"))
    ended = os.pidfd_open(child)
    if ended not in select.select([connection, ended], [], [])[0]:  # the client was killed
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(code.to_bytes(2, "big", signed=True))


def run(words, cwd, env):
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    words = words[1:] if words[0] == "-u" else words
    code = 0
    try:
        if words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], cwd
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
