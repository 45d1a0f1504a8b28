// Warpgroups that issue their GEMMs one after the other, in a fixed circle.
//
// Named barrier FIRST_BARRIER + w is warpgroup w's permission: w waits there with its own 128 threads, its predecessor arrives there with its.
// The last warpgroup opens the circle, and the last turn of the last warpgroup is not passed on, so that arrivals and waits pair up.
#pragma once
#include "ptx/sync.cuh"

template <int warpgroups>
struct Turns {
    static constexpr u32 FIRST_BARRIER = 1;
    static constexpr int THREADS = 256;
    u32 warpgroup;
    /// Turns that this warpgroup has still to take; the same for every warpgroup of the block.
    int left;

    DEVICE Turns(u32 warpgroup, int turns) : warpgroup(warpgroup), left(turns) {
        if (turns > 0 && warpgroup == warpgroups - 1) named_barrier_arrive<THREADS>(FIRST_BARRIER);
    }
    DEVICE void wait() const {
        named_barrier_wait<THREADS>(FIRST_BARRIER + warpgroup);
    }
    DEVICE void pass() {
        const bool last_of_all = --left == 0 && warpgroup == warpgroups - 1;
        if (!last_of_all) named_barrier_arrive<THREADS>(FIRST_BARRIER + (warpgroup == warpgroups - 1 ? 0 : warpgroup + 1));
    }
};
