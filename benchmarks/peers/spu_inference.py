"""Encrypted inference with SPU's two-party semi2k protocol, as two processes on this machine."""

import statistics

import figures
import spu_peer

if __name__ == "__main__":
    name, batch, repeat = figures.arguments()
    times, error = spu_peer.run(spu_peer.NETS[name], spu_peer.arrays(name, batch), repeat)
    figures.report(
        "spu", name, batch, times, all_in_s=statistics.median(times), max_abs_error=error, versions=spu_peer.versions()
    )
