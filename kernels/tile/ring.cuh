// A ring of shared-memory stages between the warp that fills them and the warps that read them.
//
// Each stage has two barriers. `full` ends a phase when the producer has announced its bytes and they have landed; `empty` when as many
// readers have arrived as `init` was told. Both sides walk the ring with a Cursor; the parity flips on each lap.
#pragma once
#include "ptx/mbarrier.cuh"

/// A stage and how often the ring has been walked before it, of which only the last bit counts.
template <int stages, bool power_of_two = (stages & (stages - 1)) == 0>
struct Cursor {
    u32 at = 0;
    u32 laps = 0;

    DEVICE u32 stage() const {
        return at;
    }
    DEVICE u32 parity() const {
        return laps;
    }
    DEVICE void advance() {
        if (++at == stages) {
            at = 0;
            laps ^= 1;
        }
    }
};

/// Both in one number, which takes a third of the instructions.
template <int stages>
struct Cursor<stages, true> {
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
        mbarrier_wait(empty(at.stage()), at.parity() ^ 1);
        mbarrier_expect(full(at.stage()), bytes);
        fill(full(at.stage()));
        mbarrier_arrive(full(at.stage()));
    }
    /// Reader: whether the stage's bytes are there.
    DEVICE bool is_full(Cursor<stages> at) const {
        return mbarrier_test(full(at.stage()), at.parity());
    }
    /// Reader: waits for the stage's bytes.
    DEVICE void wait(Cursor<stages> at) const {
        mbarrier_wait(full(at.stage()), at.parity());
    }
    /// Reader: gives the stage back; one lane of each reading warp, after the warp's last read has ended, or each thread
    /// where `init` counted threads.
    DEVICE void release(Cursor<stages> at, bool elected) const {
        mbarrier_arrive_if(elected, empty(at.stage()));
    }
};
