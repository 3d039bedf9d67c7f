"""Several processes for a test, forked from this one, which has imported everything already: they start in no time."""

import functools
import gc
import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

CPU = torch.device("cpu")


def run(world, function, *args, seconds=120):
    """`function(rank, world, *args)` in a gloo group of `world` processes; what each returns, in order."""
    with tempfile.TemporaryDirectory() as folder:
        fork, store = multiprocessing.get_context("fork"), os.path.join(folder, "store")
        pipes = [fork.Pipe(duplex=False) for _ in range(world)]
        processes = [
            fork.Process(target=_in_group, args=(rank, world, store, pipes[rank][1], function, args), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            results = []
            for rank, (pipe, _) in enumerate(pipes):
                assert wait([pipe, processes[rank].sentinel], seconds), f"rank {rank} of {world} does not answer"
                assert pipe.poll(), f"rank {rank} of {world} ended with {processes[rank].exitcode}"
                failed, result = pickle.loads(pipe.recv_bytes())
                assert not failed, f"rank {rank} of {world}:\n{result}"
                results.append(result)
            return results
        finally:
            for process in processes:
                process.join(5)
                process.kill()


def _in_group(rank, world, store, pipe, function, args):
    gc.freeze()  # what the parent has not collected yet is not this process's to tear down: Ray's objects, for one
    torch.set_num_threads(1)
    try:
        init = f"file://{store}"
        dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        answer = False, function(rank, world, *args)
    except BaseException:
        answer = True, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(answer))
    if not answer[0]:
        dist.destroy_process_group()


class ForkedPopen:
    """`subprocess.Popen`, as far as launch.py asks for it, of `python -m wan22 …`: a fork that calls the command line.

    fault: called with the rank in every process before it begins."""

    def __init__(self, words, env, stdin, start_new_session, stdout=None, stderr=None, *, fault, output):
        assert words[1:3] == ["-m", "wan22"]
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            self._child(words[3:], env, stdout, stderr, fault, output)

    def _child(self, argv, env, stdout, stderr, fault, output):
        code = 70
        gc.freeze()
        try:
            os.setsid()
            os.environ.clear()
            os.environ.update(env)
            torch.set_num_threads(1)
            files = [output / "stdout", output / "stderr"] if stderr is None else [os.devnull, output / "others"]
            for number, file in enumerate(files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(n, "wb", 0), write_through=True) for n in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            fault(int(env["RANK"]))
            from wan22 import cli

            code = cli.main(argv)
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=60):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("wan22", timeout)
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    terminate = functools.partialmethod(send_signal, signal.SIGTERM)
    kill = functools.partialmethod(send_signal, signal.SIGKILL)
