// Warpgroups that issue their GEMMs one after the other, in a fixed circle.
//
// Named barrier FIRST_BARRIER + w is warpgroup w's permission: w waits there with its own 128 threads, its predecessor arrives there with its.
// The last warpgroup opens the circle, and the first closes it by taking the permission that is left over, so that arrivals and waits pair up.
#pragma once
#include "ptx/sync.cuh"

/// Without `taken` nobody waits.
template <int warpgroups, bool taken = true>
struct Turns {
    static constexpr u32 FIRST_BARRIER = 1;
    static constexpr int THREADS = 256;
    u32 warpgroup;

    DEVICE void open() const {
        if (taken && warpgroup == warpgroups - 1) named_barrier_arrive<THREADS>(FIRST_BARRIER);
    }
    DEVICE void wait() const {
        if (taken) named_barrier_wait<THREADS>(FIRST_BARRIER + warpgroup);
    }
    DEVICE void pass() const {
        if (taken) named_barrier_arrive<THREADS>(FIRST_BARRIER + (warpgroup == warpgroups - 1 ? 0 : warpgroup + 1));
    }
    /// After as many turns of every warpgroup.
    DEVICE void close() const {
        if (taken && warpgroup == 0) wait();
    }
};
