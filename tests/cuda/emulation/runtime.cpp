// Runs kernels that were compiled for the host with cuda_emulation.h: a block's threads as fibers,
// barriers and exchanges within warps, and a check of every load and store.
//
// Found and reported (the first of a launch): an access outside all known memory or outside the
// shared memory of the block, a misaligned one, a read of shared memory that nobody wrote in this
// block, two threads at the same bytes without a barrier between them (in shared memory, and in
// global memory also between blocks), threads of a block that wait at different barriers, a lane
// missing in an exchange or a product of matrices.
//
// A block may see what others have written if they hand it over: fence, atomic, and the same atomic,
// fence in the block that reads, with barriers for the threads besides the one that does so.

#include "cuda_emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

namespace {

constexpr std::size_t STACK_BYTES = 256 << 10;
constexpr unsigned MAX_THREADS = 1024;
constexpr std::size_t MAX_SHARED = 228 << 10;
constexpr int WARP = 32;

enum class State { READY, AT_BARRIER, IN_COLLECTIVE, DONE };

struct Fiber : Thread {
    unsigned number = 0;  // within the block
    State state = State::DONE;
    const char *site = nullptr;
    // What it brought to the exchange, or to the barrier, that it waits in, and what came of it.
    Collective kind = SYNC_WARP;
    unsigned mask = 0;
    std::uint64_t value = 0;
    int argument = 0, width = 32;
    std::uint64_t result = 0;
    Matrices matrices;
    // The epoch of its last fence, and where it has updated something since: not yet seen are the
    // others who did so there.
    std::uint64_t fenced_in = 0;
    std::uintptr_t updated = 0;
    char *stack = nullptr;
#if defined(__x86_64__)
    void *stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
};

// Who touched a byte, and when: epochs count barriers of the block and exchanges of the warp.
struct Touch {
    std::uint64_t block_epoch = 0;  // unique over all blocks and launches
    std::uint32_t warp_epoch = 0;
    std::uint16_t thread = 0;
    bool atomic = false;
};

struct Shadow {
    Touch write;
    Touch read;
    // Whether threads beside read.thread have read it in that block epoch: in its warp, in others.
    bool more_lanes = false, more_warps = false;
    std::uint64_t initialised_in = 0;  // serial of the block
};

struct Region {
    std::uintptr_t start, end;
    bool writable;
};

struct GlobalTouch {
    std::uint64_t block = 0;   // serial of the block that touched it last
    std::uint64_t other = 0;   // another block that read it
    bool written = false, atomic = false;
    Shadow within;             // of the block that touched it last
};

std::vector<Region> regions;         // sorted; global memory
std::vector<Region> constants;       // the module's own read-only data, of the kernel that runs
std::vector<Fiber> fibers(MAX_THREADS);
alignas(256) unsigned char shared_memory[MAX_SHARED];
std::vector<Shadow> shared_shadow(MAX_SHARED);
std::unordered_map<std::uintptr_t, GlobalTouch> global_shadow;  // by byte

// What a block has handed over: all that it did before this epoch. To whom it is handed: a thread at
// once, the others of its block behind the epoch in which that has seen it.
struct Handover {
    std::uint64_t block, before;
    unsigned thread = 0;
    std::uint64_t seen_in = 0;
};
std::unordered_map<std::uintptr_t, std::vector<Handover>> handed_at;  // in this launch, by the atomic
std::unordered_map<std::uint64_t, Handover> handed;                   // to the block that runs, by giver

std::size_t dynamic_size, static_used;
std::unordered_map<const void *, std::size_t> static_arrays;
unsigned block_threads, alive;
std::uint64_t block_serial, block_epoch;
std::uint64_t launch_first_serial;
std::vector<std::uint32_t> warp_epochs(MAX_THREADS / WARP);

// Lanes of a warp that have come to an exchange, and wait for the others of its mask.
struct Meeting {
    const char *site;
    Collective kind;
    unsigned mask, arrived;
};
std::vector<std::vector<Meeting>> warp_meetings(MAX_THREADS / WARP);
bool check_races, interleave;
std::uint64_t random_state;

std::string error;
// Where in the module's code the access was that failed; null where the message names the place.
const void *error_code;
bool failed;

const void *kernel_function;
const void *kernel_argument;

Fiber *current() { return static_cast<Fiber *>(self); }

std::uint64_t random_number() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

// -- switching -------------------------------------------------------------------------------

#if defined(__x86_64__)
void *scheduler_stack_pointer;

extern "C" void emulation_switch(void **save, void *load);
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, .-emulation_switch
)");

void to_scheduler(Fiber *fiber) { emulation_switch(&fiber->stack_pointer, scheduler_stack_pointer); }
void to_fiber(Fiber *fiber) { emulation_switch(&scheduler_stack_pointer, fiber->stack_pointer); }
#else
ucontext_t scheduler_context;
void to_scheduler(Fiber *fiber) { swapcontext(&fiber->context, &scheduler_context); }
void to_fiber(Fiber *fiber) { swapcontext(&scheduler_context, &fiber->context); }
#endif

void wait_for_others() { to_scheduler(current()); }

void fiber_main() {
    reinterpret_cast<void (*)(const void *)>(const_cast<void *>(kernel_function))(kernel_argument);
    Fiber *fiber = current();
    fiber->state = State::DONE;
    alive--;
    to_scheduler(fiber);
    __builtin_unreachable();
}

void prepare(Fiber &fiber) {
    if (!fiber.stack) {
        void *memory = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        fiber.stack = static_cast<char *>(memory);
        mprotect(fiber.stack, 4096, PROT_NONE);
    }
    fiber.state = State::READY;
    fiber.fenced_in = fiber.updated = 0;
#if defined(__x86_64__)
    // fiber_main is entered as by a call: the stack is 16 bytes aligned but for the return address.
    // Stacks begin at different places of a page, or all would compete for the same lines of the cache.
    void **top = reinterpret_cast<void **>(fiber.stack + STACK_BYTES - 16 - fiber.number * 1088 % 65536);
    *--top = nullptr;
    *--top = reinterpret_cast<void *>(&fiber_main);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
#endif
}

// -- failing ---------------------------------------------------------------------------------

// Where something was done: a place of the source, or an address in the module's code.
struct Place {
    const char *text;
    const void *code;
};

[[gnu::format(printf, 2, 3)]]
void report(Place place, const char *format, ...) {
    if (failed) return;
    failed = true;
    error_code = place.code;
    char text[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    error = text;
    if (self) {
        char where[160];
        snprintf(where, sizeof where, " (block %u,%u,%u thread %u,%u,%u)", self->block_index.x,
                 self->block_index.y, self->block_index.z, self->thread_index.x,
                 self->thread_index.y, self->thread_index.z);
        error += where;
    }
    if (place.text) error += std::string(" at ") + place.text;
}

// The launch has failed: the scheduler won't come back to this fiber.
[[noreturn]] void give_up() {
    to_scheduler(current());
    __builtin_unreachable();
}

// -- checks ----------------------------------------------------------------------------------

bool ordered(const Touch &earlier, const Fiber *now) {
    if (earlier.block_epoch != block_epoch) return true;
    if (earlier.thread == now->number) return true;
    return earlier.thread / WARP == now->number / WARP &&
           earlier.warp_epoch < warp_epochs[now->number / WARP];
}

// Whether an access races with what `shadow` remembers of the same byte; remembers it.
bool races(Shadow &shadow, const Fiber *now, bool write, bool atomic) {
    bool race = shadow.write.block_epoch && !ordered(shadow.write, now) &&
                !(atomic && shadow.write.atomic);
    Touch touch{block_epoch, warp_epochs[now->number / WARP], (std::uint16_t)now->number, atomic};
    if (write) {
        if (shadow.read.block_epoch == block_epoch && !(atomic && shadow.read.atomic)) {
            bool same_warp = shadow.read.thread / WARP == now->number / WARP;
            race |= !ordered(shadow.read, now);
            race |= shadow.more_warps;
            race |= shadow.more_lanes && same_warp && shadow.read.warp_epoch == touch.warp_epoch;
        }
        shadow.write = touch;
    }
    if (!write || atomic) {
        bool fresh = shadow.read.block_epoch != block_epoch;
        bool same_warp = !fresh && shadow.read.thread / WARP == now->number / WARP;
        bool same_time = same_warp && shadow.read.warp_epoch == touch.warp_epoch;
        shadow.more_warps = !fresh && (shadow.more_warps || !same_warp);
        shadow.more_lanes =
            same_time && (shadow.more_lanes || shadow.read.thread != now->number);
        shadow.read = touch;
    }
    return race;
}

const Region *region_of(std::vector<Region> &in, std::uintptr_t address) {
    static thread_local const Region *last = nullptr;
    if (last >= in.data() && last < in.data() + in.size() && address >= last->start &&
        address < last->end)
        return last;
    auto after = std::upper_bound(in.begin(), in.end(), address,
                                  [](std::uintptr_t a, const Region &r) { return a < r.start; });
    if (after == in.begin()) return nullptr;
    const Region &found = *(after - 1);
    if (address >= found.end) return nullptr;
    return last = &found;
}

// Whether the block that touched a byte last has handed it over to the thread that does now.
bool handed_over(const GlobalTouch &touch, const Fiber *now) {
    const auto found = handed.find(touch.block);
    if (found == handed.end()) return false;
    const Handover &over = found->second;
    const bool there = touch.within.write.block_epoch < over.before && touch.within.read.block_epoch < over.before;
    return there && (now->number == over.thread || block_epoch > over.seen_in);
}

void touch_global(Place place, std::uintptr_t address, unsigned size, bool write, bool atomic) {
    Fiber *now = current();
    for (unsigned i = 0; i < size; i++) {
        GlobalTouch &touch = global_shadow[address + i];
        bool race = false;
        if (touch.block != block_serial) {
            bool this_launch = touch.block >= launch_first_serial;
            if (this_launch && (touch.written || write) && !(touch.atomic && atomic) && !handed_over(touch, now)) race = true;
            bool keep = this_launch && !touch.written && !write;
            std::uint64_t before = touch.block;
            touch = GlobalTouch();
            if (keep) touch.other = before;
            touch.block = block_serial;
        } else if (write && touch.other >= launch_first_serial && touch.other && !atomic) {
            race = true;
        }
        race |= races(touch.within, now, write, atomic);
        touch.written |= write;
        touch.atomic = atomic;
        if (race) {
            report(place, "race in global memory: %s %u bytes at %#lx without a barrier",
                   write ? "writes" : "reads", size, (unsigned long)address);
            give_up();
        }
    }
}

void access(Place place, std::uintptr_t address, unsigned size, bool write, bool aligned,
            bool atomic) {
    Fiber *now = current();
    if (!now || failed) return;
    auto stack = reinterpret_cast<std::uintptr_t>(now->stack);
    if (address >= stack && address + size <= stack + STACK_BYTES) return;
    if (aligned && address % size) {
        report(place, "misaligned: %s %u bytes at %#lx", write ? "writes" : "reads", size,
               (unsigned long)address);
        give_up();
    }
    auto shared = reinterpret_cast<std::uintptr_t>(shared_memory);
    if (address >= shared && address < shared + MAX_SHARED) {
        std::size_t offset = address - shared;
        if (offset + size > dynamic_size + static_used) {
            report(place, "out of bounds: %s %u bytes at %zu of %zu bytes of shared memory",
                   write ? "writes" : "reads", size, offset, dynamic_size + static_used);
            give_up();
        }
        for (unsigned i = 0; i < size; i++) {
            Shadow &shadow = shared_shadow[offset + i];
            if ((!write || atomic) && shadow.initialised_in != block_serial) {
                report(place, "uninitialised: reads %u bytes at %zu of shared memory", size, offset);
                give_up();
            }
            if (races(shadow, now, write, atomic)) {
                report(place, "race in shared memory: %s %u bytes at %zu without a barrier",
                       write ? "writes" : "reads", size, offset);
                give_up();
            }
            if (write) shadow.initialised_in = block_serial;
        }
        return;
    }
    if (const Region *region = region_of(regions, address)) {
        if (address + size > region->end || (write && !region->writable)) {
            report(place, "out of bounds: %s %u bytes at %#lx, %lu behind the start of %lu bytes%s",
                   write ? "writes" : "reads", size, (unsigned long)address,
                   (unsigned long)(address - region->start),
                   (unsigned long)(region->end - region->start),
                   region->writable ? "" : " (read-only)");
            give_up();
        }
        if (check_races) touch_global(place, address, size, write, atomic);
        // Between any two accesses of a thread others may do something.
        if (interleave && random_number() % 4 == 0) to_scheduler(now);
        return;
    }
    // What threadIdx and its like are read from.
    auto variables = reinterpret_cast<std::uintptr_t>(now), pointer = reinterpret_cast<std::uintptr_t>(&self);
    if (!write && ((address >= variables && address + size <= variables + sizeof(Thread)) || address == pointer)) return;
    // The record of the kernel, and tables of the module.
    auto argument = reinterpret_cast<std::uintptr_t>(kernel_argument);
    if (!write && address >= argument && address + size <= argument + 4096) return;
    if (!write)
        for (const Region &region : constants)
            if (address >= region.start && address + size <= region.end) return;
    report(place, "out of bounds: %s %u bytes at %#lx, which is no memory of the device",
           write ? "writes" : "reads", size, (unsigned long)address);
    give_up();
}

// -- exchanges of warps ----------------------------------------------------------------------

struct Bytes {
    enum { IN_WORD = 4 };
    typedef int Number;
    typedef unsigned Total;  // what doesn't fit wraps around
    static int of(const int *words, int i) { return (signed char)(words[i / 4] >> (8 * (i % 4))); }
};
struct Halves {
    enum { IN_WORD = 2 };
    typedef float Number;
    typedef float Total;
    static float of(const int *words, int i) {
        return emulated_half_to_float((unsigned short)(words[i / 2] >> (16 * (i % 2))));
    }
};
struct Bfloats : Halves {
    static float of(const int *words, int i) {
        return __uint_as_float((unsigned)words[i / 2] >> (16 * (i % 2)) << 16);
    }
};

// Which lane has what is said in the PTX ISA, "Matrix Fragments for mma.m8n8k16" and the like: of a
// lane, element `i` of a matrix is at (row, column). Bytes and floats differ in how many a word has.
template <typename E> void multiply_fragments(Fiber *warp) {
    const int m = warp->matrices.m, k = warp->matrices.k, in_word = E::IN_WORD;
    typename E::Number a[16][32], b[32][8];
    for (int lane = 0; lane < WARP; lane++) {
        const Matrices &mine = warp[lane].matrices;
        const int group = lane >> 2, in_group = lane % 4;
        for (int i = 0; i < m * k / WARP; i++) {
            // Of 16 rows each second word is of the lower ones; what is left is further along K.
            const int word = i / in_word, row = m == 16 && word % 2 ? group + 8 : group;
            const int column = in_group * in_word + i % in_word + word / (m / 8) * 4 * in_word;
            a[row][column] = E::of(mine.a, i);
        }
        for (int i = 0; i < k * 8 / WARP; i++)
            b[in_group * in_word + i % in_word + i / in_word * 4 * in_word][group] = E::of(mine.b, i);
    }
    for (int lane = 0; lane < WARP; lane++) {
        const int group = lane >> 2, in_group = lane % 4;
        auto *sums = static_cast<typename E::Total *>(warp[lane].matrices.sums);
        for (int i = 0; i < m * 8 / WARP; i++) {
            const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
            for (int j = 0; j < k; j++) sums[i] += a[row][j] * b[j][column];
        }
    }
}

void complete(Fiber *warp, unsigned mask) {
    if (warp->kind == MATRICES) {
        switch (warp->matrices.of) {
        case BYTES: multiply_fragments<Bytes>(warp); break;
        case HALVES: multiply_fragments<Halves>(warp); break;
        case BFLOATS: multiply_fragments<Bfloats>(warp); break;
        }
    }
    for (int lane = 0; lane < WARP; lane++) {
        if (!(mask >> lane & 1)) continue;
        Fiber &fiber = warp[lane];
        const int width = fiber.width, first = lane / width * width;
        int from = lane;
        std::uint64_t result = 0;
        switch (fiber.kind) {
        case SHUFFLE: from = first + (fiber.argument & (width - 1)); break;
        case SHUFFLE_UP: from = lane - fiber.argument >= first ? lane - fiber.argument : lane; break;
        case SHUFFLE_DOWN:
            from = lane + fiber.argument < first + width ? lane + fiber.argument : lane;
            break;
        case SHUFFLE_XOR: {
            int other = lane ^ fiber.argument;
            from = other < first + width ? other : lane;
            break;
        }
        case BALLOT: case ANY: case ALL: {
            unsigned votes = 0;
            for (int other = 0; other < WARP; other++)
                if ((mask >> other & 1) && warp[other].value) votes |= 1u << other;
            result = fiber.kind == BALLOT ? votes : fiber.kind == ANY ? votes != 0 : votes == mask;
            break;
        }
        case MATCH_ANY: {
            unsigned same = 0;
            for (int other = 0; other < WARP; other++)
                if ((mask >> other & 1) && warp[other].value == fiber.value) same |= 1u << other;
            result = same;
            break;
        }
        case SYNC_WARP: case MATRICES: break;
        }
        if (fiber.kind <= SHUFFLE_XOR) {
            if (!(mask >> from & 1)) {
                report({fiber.site, nullptr}, "exchange: lane %d reads lane %d, which takes no part", lane, from);
                return;
            }
            result = warp[from].value;
        }
        fiber.result = result;
    }
    for (int lane = 0; lane < WARP; lane++)
        if (mask >> lane & 1) warp[lane].state = State::READY;
}

void run_block(unsigned n_threads) {
    std::vector<unsigned> order(n_threads);
    for (unsigned i = 0; i < n_threads; i++) order[i] = i;
    while (alive && !failed) {
        bool progress = false;
        // Threads of a block run in no order that they could rely on.
        for (unsigned i = n_threads - 1; i > 0; i--) std::swap(order[i], order[random_number() % (i + 1)]);
        for (unsigned number : order) {
            Fiber &fiber = fibers[number];
            if (fiber.state != State::READY) continue;
            progress = true;
            self = &fiber;
            to_fiber(&fiber);
            self = nullptr;
            if (failed) return;
        }
        if (progress || !alive) continue;
        // Nobody can go on: all that are left wait at one barrier, or something is wrong.
        const Fiber *first = nullptr;
        for (unsigned i = 0; i < n_threads; i++) {
            Fiber &fiber = fibers[i];
            if (fiber.state == State::DONE) continue;
            self = &fiber;
            if (fiber.state == State::IN_COLLECTIVE) {
                report({fiber.site, nullptr}, "exchange: lanes %#x are to take part and not all of them come", fiber.mask);
                self = nullptr;
                return;
            }
            if (first && fiber.site != first->site) {
                report({fiber.site, nullptr}, "barrier: threads of a block wait at different ones");
                self = nullptr;
                return;
            }
            if (!first) first = &fiber;
        }
        self = nullptr;
        bool any = false, every = true;
        int count = 0;
        for (unsigned i = 0; i < n_threads; i++)
            if (fibers[i].state == State::AT_BARRIER) {
                any |= fibers[i].value != 0;
                every &= fibers[i].value != 0;
                count += fibers[i].value != 0;
            }
        for (unsigned i = 0; i < n_threads; i++)
            if (fibers[i].state == State::AT_BARRIER) {
                fibers[i].result = fibers[i].argument == 0 ? any : fibers[i].argument == 1 ? every : count;
                fibers[i].state = State::READY;
            }
        block_epoch++;
    }
}

}  // namespace

Thread *self;

int barrier_reduce(const char *site, int predicate, int kind) {
    Fiber *fiber = current();
    fiber->site = site;
    fiber->value = predicate != 0;
    fiber->argument = kind;
    fiber->state = State::AT_BARRIER;
    wait_for_others();
    return (int)current()->result;
}

void barrier(const char *site) { barrier_reduce(site, 0, 0); }

std::uint64_t collective(const char *site, Collective kind, unsigned mask, std::uint64_t value,
                         int argument, int width) {
    Fiber *fiber = current();
    const unsigned lane = fiber->number % WARP;
    Fiber *warp = fiber - lane;
    fiber->site = site;
    fiber->kind = kind;
    fiber->mask = mask;
    fiber->value = value;
    fiber->argument = argument;
    fiber->width = width;
    if (!(mask >> lane & 1)) {
        report({site, nullptr}, "exchange: lane %u is not in the mask %#x that it gives", lane, mask);
        give_up();
    }
    fiber->state = State::IN_COLLECTIVE;
    // A full mask in a block whose last warp is not full is what kernels write; lanes that don't
    // exist take no part.
    const unsigned here = block_threads - (fiber->number - lane);
    const unsigned expected = here >= WARP ? mask : mask & ((1u << here) - 1);
    std::vector<Meeting> &meetings = warp_meetings[fiber->number / WARP];
    std::size_t at = 0;
    while (at < meetings.size() && !(meetings[at].site == site && meetings[at].kind == kind && meetings[at].mask == mask)) at++;
    if (at == meetings.size()) meetings.push_back({site, kind, mask, 0});
    meetings[at].arrived |= 1u << lane;
    if (meetings[at].arrived == expected) {
        meetings.erase(meetings.begin() + at);
        complete(warp, expected);
        if (failed) give_up();
        // Every exchange orders what its lanes did before against what they do after. A product of
        // matrices promises nothing of that.
        if (kind != MATRICES) warp_epochs[fiber->number / WARP]++;
    } else {
        wait_for_others();
    }
    return current()->result;
}

void multiply_matrices(const char *site, const Matrices &lane) {
    Fiber *fiber = current();
    const unsigned here = block_threads - fiber->number / WARP * WARP;
    if (here < WARP) {
        report({site, nullptr}, "a product of matrices in a warp of %u lanes", here);
        give_up();
    }
    fiber->matrices = lane;
    collective(site, MATRICES, 0xffffffffu, 0, 0, WARP);
}

unsigned active_lanes() {
    Fiber *fiber = current();
    Fiber *warp = fiber - fiber->number % WARP;
    unsigned mask = 0;
    for (int lane = 0; lane < WARP; lane++)
        if (warp + lane < &fibers[0] + block_threads && warp[lane].state != State::DONE) mask |= 1u << lane;
    return mask;
}

void atomic_access(const char *site, void *address, unsigned size) {
    const auto where = reinterpret_cast<std::uintptr_t>(address);
    access({site, nullptr}, where, size, true, true, true);
    Fiber *now = current();
    if (now->fenced_in == block_epoch) handed_at[where].push_back({block_serial, block_epoch});
    now->updated = where;
}

void fence() {
    Fiber *now = current();
    now->fenced_in = block_epoch;
    if (!now->updated) return;
    for (Handover over : handed_at[now->updated]) {
        over.thread = now->number;
        over.seen_in = block_epoch;
        handed[over.block] = over;
    }
    now->updated = 0;
}

void trap(const char *site, const char *what) {
    report({site, nullptr}, "%s", what);
    give_up();
}

void *shared_array(const char *site, std::size_t size, std::size_t alignment) {
    auto known = static_arrays.find(site);
    if (known != static_arrays.end()) return shared_memory + known->second;
    std::size_t align = alignment < 16 ? 16 : alignment;
    std::size_t at = (dynamic_size + static_used + align - 1) / align * align;
    if (at + size > MAX_SHARED) {
        report({site, nullptr}, "shared memory: %zu bytes are more than there are", at + size);
        give_up();
    }
    static_used = at + size - dynamic_size;
    static_arrays[site] = at;
    return shared_memory + at;
}

void *dynamic_shared() { return shared_memory; }

}  // namespace emulation

// -- what Python calls -------------------------------------------------------------------------

using namespace emulation;

// As in __init__.py.
struct Launch {
    const void *function, *argument;
    unsigned grid[3], block[3];
    std::size_t shared;
    // 1: global memory is watched for races, 2: threads take turns at any access of it, 4: numbers below
    // the normal ones are 0.
    unsigned how;
    std::uint64_t seed;
    // Memory: start, end, whether it may be written; what of the module may be read: start, end.
    const std::uint64_t *regions;
    std::size_t n_regions;
    const std::uint64_t *constants;
    std::size_t n_constants;
    // What went wrong, and where in the module's code; null where the message names the place.
    char error[600];
    const void *error_code;
};

static bool run(const Launch &launch) {
    const unsigned *grid = launch.grid, *block = launch.block;
    const std::size_t shared_bytes = launch.shared;
    failed = false;
    error.clear();
    error_code = nullptr;
    self = nullptr;
    regions.clear();
    for (std::size_t i = 0; i < launch.n_regions; i++) {
        const std::uint64_t *region = launch.regions + 3 * i;
        regions.push_back({(std::uintptr_t)region[0], (std::uintptr_t)region[1], region[2] != 0});
    }
    std::sort(regions.begin(), regions.end(), [](const Region &a, const Region &b) { return a.start < b.start; });
    constants.clear();
    for (std::size_t i = 0; i < launch.n_constants; i++)
        constants.push_back({(std::uintptr_t)launch.constants[2 * i], (std::uintptr_t)launch.constants[2 * i + 1], false});
    check_races = launch.how & 1;
    interleave = launch.how & 2;
    random_state = launch.seed | 1;
    global_shadow.clear();
    handed_at.clear();
    launch_first_serial = block_serial + 1;
    kernel_function = launch.function;
    kernel_argument = launch.argument;
    block_threads = block[0] * block[1] * block[2];
    if (block_threads == 0 || block_threads > MAX_THREADS || block[2] > 64) {
        report({"the launch", nullptr}, "launch: a block of %u threads", block_threads);
        return false;
    }
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535) {
        report({"the launch", nullptr}, "launch: a grid of %u x %u x %u blocks", grid[0], grid[1], grid[2]);
        return false;
    }
    if (shared_bytes > MAX_SHARED) {
        report({"the launch", nullptr}, "launch: %zu bytes of shared memory", shared_bytes);
        return false;
    }
    dynamic_size = shared_bytes;
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                block_serial++;
                block_epoch++;
                static_used = 0;
                static_arrays.clear();
                handed.clear();
                alive = block_threads;
                for (auto &meetings : warp_meetings) meetings.clear();
                // What an earlier block left there must not look like a result.
                std::memset(shared_memory, 0xa5, sizeof shared_memory < shared_bytes + 49152 ? sizeof shared_memory : shared_bytes + 49152);
                for (unsigned i = 0; i < block_threads; i++) {
                    Fiber &fiber = fibers[i];
                    fiber.number = i;
                    fiber.thread_index = {i % block[0], i / block[0] % block[1], i / (block[0] * block[1])};
                    fiber.block_index = {x, y, z};
                    fiber.block_size = {block[0], block[1], block[2]};
                    fiber.grid_size = {grid[0], grid[1], grid[2]};
                    prepare(fiber);
                }
                run_block(block_threads);
                self = nullptr;
                if (failed) return false;
            }
    return true;
}

// Runs a kernel over its grid, one at a time; 0, or 1 where `error` tells what went wrong.
extern "C" int emulation_launch(Launch *launch) {
    static std::mutex one;
    const std::lock_guard<std::mutex> lock(one);
#if defined(__x86_64__)
    const unsigned before = __builtin_ia32_stmxcsr();
    if (launch->how & 4) __builtin_ia32_ldmxcsr(before | 0x8040);
#endif
    const bool sound = run(*launch);
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(before);
#endif
    if (sound) return 0;
    snprintf(launch->error, sizeof launch->error, "%s", error.c_str());
    launch->error_code = error_code;
    return 1;
}

extern "C" {

// -- what -fsanitize=thread calls at every load and store ----------------------------------------

#define SITE Place{nullptr, __builtin_return_address(0)}
#define HOOKS(size)                                                                              \
    void __tsan_read##size(void *a) { access(SITE, (std::uintptr_t)a, size, false, true, false); } \
    void __tsan_write##size(void *a) { access(SITE, (std::uintptr_t)a, size, true, true, false); } \
    void __tsan_volatile_read##size(void *a) { access(SITE, (std::uintptr_t)a, size, false, true, false); } \
    void __tsan_volatile_write##size(void *a) { access(SITE, (std::uintptr_t)a, size, true, true, false); } \
    void __tsan_unaligned_read##size(void *a) { access(SITE, (std::uintptr_t)a, size, false, false, false); } \
    void __tsan_unaligned_write##size(void *a) { access(SITE, (std::uintptr_t)a, size, true, false, false); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void *a, std::size_t n) { if (n) access(SITE, (std::uintptr_t)a, n, false, false, false); }
void __tsan_write_range(void *a, std::size_t n) { if (n) access(SITE, (std::uintptr_t)a, n, true, false, false); }
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}
void *__tsan_memcpy(void *to, const void *from, std::size_t n) {
    if (n) {
        access(SITE, (std::uintptr_t)from, n, false, false, false);
        access(SITE, (std::uintptr_t)to, n, true, false, false);
    }
    return std::memcpy(to, from, n);
}
void *__tsan_memset(void *to, int value, std::size_t n) {
    if (n) access(SITE, (std::uintptr_t)to, n, true, false, false);
    return std::memset(to, value, n);
}

// What -fsanitize=alignment calls: the compiler takes vectors apart, so that their parts may be aligned
// where the whole, which a card loads at once, is not.
void __ubsan_handle_type_mismatch_v1(const void *, const void *pointer) {
    if (!current() || failed) return;
    report({nullptr, __builtin_return_address(0)}, "misaligned: loads or stores at %p", pointer);
    give_up();
}

}  // extern "C"
