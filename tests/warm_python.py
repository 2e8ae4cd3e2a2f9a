"""A python that has torch and transformers loaded already, for tests that start dozens of stages: seconds less for each.

    with warm_python(folder) as python: subprocess.run([python, "evaluate.py", ...])

`python` is a small client of a server that forks itself for every call: same script, arguments, folder, environment, standard
streams and exit code as with a fresh interpreter, and nothing of the project's is loaded before. `-m` goes to a fresh one."""
import contextlib, json, os, runpy, signal, socket, subprocess, sys
from pathlib import Path

CLIENT = '''#!{python} -SE
import json, os, socket, sys
if sys.argv[1].startswith("-"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    sys.exit(server.recv(1)[0])
'''


@contextlib.contextmanager
def warm_python(folder):
    path, client = str(Path(folder, "warm.sock")), Path(folder, "warm_python")
    client.write_text(CLIENT.format(python=sys.executable, path=path))
    client.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, path], stdout=subprocess.PIPE)
    assert server.stdout.readline() == b"ready\n"
    try:
        yield str(client)
    finally:
        server.kill()
        server.wait()


def serve(path):
    import anthropic, torch.distributed.checkpoint, torch.distributed.fsdp, transformers  # noqa: F401
    for name in ("AutoModelForCausalLM", "AutoModelForTokenClassification", "AutoTokenizer", "LlamaForCausalLM",
                 "LlamaForTokenClassification", "LlamaTokenizer"):
        getattr(transformers, name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(16)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the handlers
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            handle(connection)
            os._exit(0)
        connection.close()


def handle(connection):
    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    words, cwd, env = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    child = os.fork()
    if child:
        connection.sendall(bytes([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256]))
        return
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
    code = 0
    try:
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
