// A ring of shared-memory stages between the warp that fills them and the warps that read them.
//
// Each stage has two barriers. `full` ends a phase when the producer has announced its bytes and they have landed; `empty` when as many
// readers have arrived as `init` was told. Both sides walk the ring with a Cursor; the parity flips on each lap.
#pragma once
#include "ptx/mbarrier.cuh"

template <int stages>
struct Cursor {
    u32 stage = 0;
    u32 parity = 0;

    DEVICE void advance() {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

/// A Cursor where stages are a power of two: one number, of which only the last bit above the stage counts.
template <int stages>
struct Count {
    static_assert((stages & (stages - 1)) == 0);
    u32 count = 0;

    DEVICE u32 stage() const {
        return count % stages;
    }
    DEVICE u32 parity() const {
        return count / stages % 2;
    }
    DEVICE void advance() {
        ++count;
    }
    DEVICE operator Cursor<stages>() const {
        return {stage(), parity()};
    }
};

/// `barriers`: 2 * stages mbarriers of 8 bytes.
template <int stages>
struct Ring {
    u32 barriers;

    static constexpr int BYTES = 16 * stages;

    DEVICE u32 full(u32 stage) const {
        return barriers + 8 * stage;
    }
    DEVICE u32 empty(u32 stage) const {
        return barriers + 8 * (stages + stage);
    }
    /// By one thread, before any use. `readers`, `writers`: arrivals that end a phase.
    DEVICE void init(u32 readers, u32 writers = 1) const {
        for (u32 stage = 0; stage < stages; ++stage) {
            mbarrier_init(full(stage), writers);
            mbarrier_init(empty(stage), readers);
        }
    }
    /// Producer: waits until the stage may be overwritten (at once on the first lap), announces the bytes that the copy engine will bring, and lets
    /// `fill`, which is given the full barrier, start the copies. Its own writes come before the announcement.
    template <class Fill>
    DEVICE void open(Cursor<stages> at, u32 bytes, Fill fill) const {
        mbarrier_wait(empty(at.stage), at.parity ^ 1);
        mbarrier_expect(full(at.stage), bytes);
        fill(full(at.stage));
        mbarrier_arrive(full(at.stage));
    }
    /// Reader: waits for the stage's bytes.
    DEVICE void wait(Cursor<stages> at) const {
        mbarrier_wait(full(at.stage), at.parity);
    }
    /// Reader: gives the stage back; one lane of each reading warp, after the warp's last read has ended, or each thread
    /// where `init` counted threads.
    DEVICE void release(Cursor<stages> at, bool elected) const {
        mbarrier_arrive_if(elected, empty(at.stage));
    }
};
