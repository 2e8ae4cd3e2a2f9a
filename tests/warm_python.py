"""A python that has already loaded torch and transformers, for tests that start dozens of stages.
It saves three seconds for each.

    with warm_python(folder) as python: subprocess.run([python, "evaluate.py", ...])

`python` is a small client of a server that forks itself for every call. Script, arguments, folder,
environment, standard streams, signals and exit code are the same as with a fresh interpreter, and
no file of the project is loaded before. With PYTHON_EXEC=python torchrun's ranks use it, too."""
import contextlib, importlib, json, os, runpy, select, signal, socket, subprocess, sys
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
if code < 0:  # the child was ended by a signal: end by the same one
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
'''


@contextlib.contextmanager
def warm_python(folder):
    """Start a server -> the path of a client that is used like a python interpreter"""
    path = str(Path(folder, "warm.sock"))
    client = Path(folder, "warm_python")
    client.write_text(CLIENT.format(python=sys.executable, path=path))
    client.chmod(0o755)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, __file__, path], stdout=subprocess.PIPE,
                              stdin=subprocess.DEVNULL, env=environment)
    assert server.stdout.readline() == b"ready\n"
    try:
        yield str(client)
    finally:
        server.kill()
        server.wait()


# What every stage loads: modules, and classes that transformers loads when they are first used.
MODULES = ("anthropic", "torch.distributed.checkpoint", "torch.distributed.fsdp",
           "torch.distributed.elastic.multiprocessing.errors", "torch.distributed.launcher.api")
CLASSES = ("AutoModelForCausalLM", "AutoModelForTokenClassification", "AutoTokenizer",
           "LlamaForCausalLM", "LlamaForTokenClassification", "LlamaTokenizer")


def serve_forks(path):
    """The server: load everything once, then fork for each client"""
    import transformers
    for name in MODULES:
        importlib.import_module(name)
    for name in CLASSES:
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
            handle_call(connection)
            os._exit(0)
        connection.close()


def handle_call(connection):
    """One call. A child runs it; this process tells the client how the child ended, and kills the
    child if the client is gone."""
    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    request = connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
    words, cwd, env = json.loads(request)

    child = os.fork()
    if child == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        run_script(words, cwd, env)
    for stream in streams:
        os.close(stream)
    connection.sendall(child.to_bytes(4, "big"))

    ended = os.pidfd_open(child)
    ready, _, _ = select.select([connection, ended], [], [])
    if ended not in ready:  # the client was killed
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(code.to_bytes(2, "big", signed=True))


def run_script(words, cwd, env):
    """What `python words...` does in a fresh interpreter; does not return"""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if words[0] == "-u":
        words = words[1:]
    code = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path[0] = cwd
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path[0] = str(Path(words[0]).resolve().parent)
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
    serve_forks(sys.argv[1])
