"""A Python that runs one piece of code after the other and keeps what they define. `python.py` starts it in a sandbox
with this text as its program; it imports nothing of moonbase.

A request is a line of JSON {"number", "code"} on a socket, whose number is the last argument; its answer {"number",
"error", "trouble"?} comes when the code is done. What the code writes goes to the outputs like that of any program.
"""

import ast
import faulthandler
import json
import linecache
import os
import socket
import sys
import traceback
import types


def execute(code, number, module):
    """Run it like a notebook cell: the value of a last expression is shown. True if it raised."""
    name = f"<call {number}>"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    try:
        tree = ast.parse(code, name)
        last = None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)
        exec(compile(tree, name, "exec"), module.__dict__)
        if last is not None:
            value = eval(compile(last, name, "eval"), module.__dict__)
            if value is not None:
                module._ = value
                print(repr(value))
    except SystemExit as error:
        print(f"SystemExit: {error}")
        return bool(error.code)
    except BaseException as error:
        # Less the frame of this function, which is none of the caller's business.
        frames = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(type(error), error, frames)
        return True
    return False


def main():
    """Answer until the socket closes."""
    channel = socket.socket(fileno=int(sys.argv[-1]))
    channel.set_inheritable(False)
    own = os.getpid()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    faulthandler.enable()
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = [""]
    sys.path.insert(0, "")
    with channel.makefile("r", encoding="utf-8") as requests:
        for line in requests:
            request = json.loads(line)
            answer = {"number": request["number"], "error": True}
            try:
                answer["error"] = execute(request["code"], request["number"], module)
                sys.stdout.flush()
                sys.stderr.flush()
            except BaseException as error:
                # Such as outputs that the code closed: it must be told in another way than by them.
                answer |= {"error": True, "trouble": f"[the output is lost: {type(error).__name__}: {error}]"[:500]}
            if os.getpid() != own:
                os._exit(0)  # A fork of the code came back from it.
            channel.sendall(json.dumps(answer).encode() + b"\n")


main()
