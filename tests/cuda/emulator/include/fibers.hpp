// The threads of a block as fibers of one OS thread: switching, barriers, launching, and what goes wrong.
//
// Blocks run one after another. A thread runs until it waits for others; who runs next follows a launch's `order`
// (0: ascending, 1: descending, else shuffled by that seed), for threads, for lanes and for blocks, so that code which
// happens to work in one order fails in another. Shared memory is poisoned with 0xff before each block.
#pragma once

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
#define EMU_SWAP  // a switch of our own: ucontext makes a system call each time
#endif

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <pthread.h>
#ifndef EMU_SWAP
#include <ucontext.h>
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};

namespace emu {
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr u32 MAX_THREADS = 1024, STACK = 128 << 10, DYNAMIC = 232448, GUARD = 4096, BARRIERS = 16;
constexpr unsigned char POISON = 0xff, UNTOUCHED = 0xa5;

struct Fiber;
using Complete = void (*)(Fiber* lanes, u32 mask);

// A cp.async on its way: carried out when its thread waits for its group.
struct Copy {
  char* target;
  const char* source;
  u32 bytes;
  u32 group;
};

struct Fiber {
#ifdef EMU_SWAP
  void* sp;
#else
  ucontext_t context;
#endif
  uint3 thread;
  u32 id;
  bool done;
  const char* waits;  // what for, or null
  int line;           // of the barrier in its source, 0: unknown
  u32 mask;           // the lanes a warp operation waits for, 0: in none
  Complete operation;
  u32 in[12], out[8];  // operands and results of a warp operation
  Copy* copies;
  u32 copy_count, copy_room, groups;
};

struct Warp {
  u32 exists, ended, arrived;  // lanes; arrived: at an operation of all that exist
};

struct Barrier {
  u32 arrived, expected, waiting;
  int line;
  int count, all, any;  // of the predicates of __syncthreads_count and the like
  int result[3];
  u32 ids[MAX_THREADS];
};

// Memory that predecessors have written and that a block may not count on before griddepcontrol.wait.
struct Range {
  char* at;
  u64 bytes;
};

// What Python hands over (compiler.py has the same fields) and gets back: in `message` what went wrong, in `fault`
// the address of a forbidden access. The stacks are one process's, as guard pages for each library's would be too many.
struct Launch {
  u32 grid[3], block[3], smem, seconds;
  u64 order;
  void** arguments;
  char* stacks;  // MAX_THREADS of STACK bytes each
  const Range* hidden;
  u64 hidden_count;
  char* saved;  // room for the hidden bytes
  u64 fault;
  u32 waited, launched, early;  // some thread waited for the predecessors; let successors start; did so without waiting
  char message[2000];
};

struct State {
  Fiber fibers[MAX_THREADS];
  Warp warps[MAX_THREADS / 32];
  Barrier barriers[BARRIERS];
  u32 queue[2 * MAX_THREADS], head, tail;
  u32 ended;
  u32 threads, smem;
  u32 order[MAX_THREADS], lanes[32];  // who goes first
  u64 spins;                          // acquiring loads since the last wait
  bool hiding, block_waited;  // griddepcontrol: the block does not see its predecessors' work yet; a thread waits
  u32 before[MAX_THREADS], before_count;  // who waits for it
  Launch* launch;
  uint3 block;
  dim3 grid_dim, block_dim;
  void (*entry)(void**);
  void** arguments;
  char* stacks;
  char* message;
  u32 room;
#ifdef EMU_SWAP
  void* main_sp;
#else
  ucontext_t main_context;
#endif
  bool failed;
  sigjmp_buf jump;
  pthread_t runner;
  u64 fault;
};

static State state;
static Fiber* volatile current;
alignas(1024) static char dynamic_memory[DYNAMIC + GUARD];

extern "C" {
extern char __start_emu_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_emu_shared[] __attribute__((weak, visibility("hidden")));
}

inline char* dynamic_shared() { return dynamic_memory; }
// Addresses of the shared state space are offsets from the dynamic part.
inline u32 shared_address(const void* p) { return static_cast<u32>(static_cast<const char*>(p) - dynamic_memory); }

// ---- switching
#ifdef EMU_SWAP
extern "C" __attribute__((visibility("hidden"))) void emu_swap(void** save, void* load);
asm(R"(
.text
.hidden emu_swap
.globl emu_swap
.type emu_swap, @function
emu_swap:
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
.size emu_swap, .-emu_swap
)");
inline void to_fiber(Fiber* from, Fiber* to) { emu_swap(&from->sp, to->sp); }
inline void from_main(Fiber* to) { emu_swap(&state.main_sp, to->sp); }
inline void to_main(Fiber* from) { emu_swap(&from->sp, state.main_sp); }
#else
inline void to_fiber(Fiber* from, Fiber* to) { swapcontext(&from->context, &to->context); }
inline void from_main(Fiber* to) { swapcontext(&state.main_context, &to->context); }
inline void to_main(Fiber* from) { swapcontext(&from->context, &state.main_context); }
#endif

// ---- failing
inline int say(const char* format, ...) {
  va_list list;
  va_start(list, format);
  const int used = state.room > 1 ? vsnprintf(state.message, state.room, format, list) : 0;
  va_end(list);
  const u32 step = used < 0 ? 0 : (u32)used < state.room ? (u32)used : state.room - 1;
  state.message += step;
  state.room -= step;
  return used;
}
inline void say_where() {
  const Fiber* f = current;
  say("block (%u, %u, %u)", state.block.x, state.block.y, state.block.z);
  if (f) say(", thread %u (warp %u lane %u)", f->id, f->id / 32, f->id % 32);
  say(state.hiding ? ", before griddepcontrol.wait: " : ": ");
}
[[noreturn]] inline void stop() {
  state.failed = true;
  to_main(current);
  abort();
}
#define EMU_FAIL(...) (emu::say_where(), emu::say(__VA_ARGS__), emu::stop())

// Nobody can run: tells who waits for what.
[[noreturn]] inline void report_stuck() {
  say("block (%u, %u, %u) is stuck:", state.block.x, state.block.y, state.block.z);
  u32 groups = 0;
  for (u32 i = 0; i < state.threads && groups < 12; groups++) {
    const Fiber& f = state.fibers[i];
    u32 end = i + 1;
    while (end < state.threads) {
      const Fiber& g = state.fibers[end];
      if (g.done != f.done || g.waits != f.waits || g.line != f.line || (!f.done && g.mask != f.mask)) break;
      end++;
    }
    say(" threads %u..%u ", i, end - 1);
    if (f.done)
      say("have ended;");
    else if (f.mask)
      say("wait in %s for lanes %08x;", f.waits, f.mask);
    else
      say("wait at %s line %d;", f.waits ? f.waits : "?", f.line);
    i = end;
  }
  stop();
}

// ---- who runs
inline void push(u32 id) {
  state.queue[state.tail] = id;
  state.tail = (state.tail + 1) % (2 * MAX_THREADS);
}

// ---- programmatic dependent launch: what predecessors have written is poison until the block waits for them. It is
// given back when all threads wait or cannot go on otherwise.
inline void hide() {
  const Launch& launch = *state.launch;
  char* saved = launch.saved;
  for (u64 i = 0; i < launch.hidden_count; i++) {
    memcpy(saved, launch.hidden[i].at, launch.hidden[i].bytes);
    memset(launch.hidden[i].at, POISON, launch.hidden[i].bytes);
    saved += launch.hidden[i].bytes;
  }
  state.hiding = true;
}
// False: something has been written there.
inline bool give_back() {
  const Launch& launch = *state.launch;
  const char* saved = launch.saved;
  bool untouched = true;
  for (u64 i = 0; i < launch.hidden_count; i++) {
    const Range& range = launch.hidden[i];
    for (u64 b = 0; b < range.bytes; b++) untouched &= static_cast<unsigned char>(range.at[b]) == POISON;
    memcpy(range.at, saved, range.bytes);
    saved += range.bytes;
  }
  state.hiding = false;
  return untouched;
}
inline bool release() {
  if (!state.hiding || !state.before_count) return false;
  if (!give_back()) EMU_FAIL("what a predecessor writes was written before griddepcontrol.wait");
  for (u32 i = 0; i < state.before_count; i++) push(state.before[i]);
  state.before_count = 0;
  return true;
}

// Gives way to the next thread that can run; comes back when somebody has pushed this one.
inline void give_way() {
  if (state.head == state.tail && !release()) report_stuck();
  Fiber* const from = current;
  Fiber* const to = &state.fibers[state.queue[state.head]];
  state.head = (state.head + 1) % (2 * MAX_THREADS);
  state.spins = 0;
  if (from == to) return;
  current = to;
  to_fiber(from, to);
}

inline void wait_for_predecessors() {
  Fiber* const f = current;
  state.block_waited = true;
  state.launch->waited = 1;
  if (!state.hiding) return;
  state.before[state.before_count++] = f->id;
  f->waits = "griddepcontrol.wait,";
  give_way();
  f->waits = nullptr;
}
inline void let_successors_start() {
  state.launch->launched = 1;
  if (!state.block_waited) state.launch->early = 1;
}

inline void thread_main() {
  state.entry(state.arguments);
  Fiber* const f = current;
  f->done = true;
  state.warps[f->id / 32].ended |= 1u << f->id % 32;
  if (++state.ended == state.threads) {
    to_main(f);
    abort();
  }
  give_way();
  abort();
}

inline void prepare(Fiber& f, u32 id) {
  Copy* const copies = f.copies;
  const u32 room = f.copy_room;
  f.id = id;
  f.thread.x = id % state.block_dim.x;
  f.thread.y = id / state.block_dim.x % state.block_dim.y;
  f.thread.z = id / state.block_dim.x / state.block_dim.y;
  f.done = false;
  f.waits = nullptr;
  f.line = 0;
  f.mask = 0;
  f.copies = copies;
  f.copy_room = room;
  f.copy_count = f.groups = 0;
  char* const stack = state.stacks + (size_t)id * STACK;
#ifdef EMU_SWAP
  void** top = reinterpret_cast<void**>(stack + STACK - 64);
  *--top = nullptr;  // the stack is 16-byte aligned before a call
  *--top = reinterpret_cast<void*>(&thread_main);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  f.sp = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stack + 4096;
  f.context.uc_stack.ss_size = STACK - 4096;
  f.context.uc_link = nullptr;
  makecontext(&f.context, &thread_main, 0);
#endif
}

// ---- barriers
// Counts `expected` arrivals; of them those with `wait` wait. line: where, when all must come to the same place.
inline void arrive(u32 number, u32 expected, bool wait, int line, int predicate = 0) {
  if (number >= BARRIERS) EMU_FAIL("there is no barrier %u", number);
  if (expected == 0 || expected % 32) EMU_FAIL("barrier %u expects %u threads, which is no multiple of 32", number, expected);
  Barrier& b = state.barriers[number];
  Fiber* const f = current;
  if (b.arrived == 0) {
    b.expected = expected;
    b.line = line;
    b.count = b.any = 0;
    b.all = 1;
  }
  if (b.expected != expected) EMU_FAIL("barrier %u: %u threads expected here, %u where others wait", number, expected, b.expected);
  if (b.line != line)
    EMU_FAIL("threads of the block are at __syncthreads in line %d while others are at the one in line %d", line, b.line);
  b.count += predicate != 0;
  b.all &= predicate != 0;
  b.any |= predicate != 0;
  b.arrived++;
  if (wait) b.ids[b.waiting++] = f->id;
  f->waits = number ? "a numbered barrier," : "__syncthreads,";
  f->line = line ? line : (int)number;
  if (b.arrived == b.expected) {
    b.result[0] = b.count;
    b.result[1] = b.all;
    b.result[2] = b.any;
    const u32 n = b.waiting;
    b.arrived = b.waiting = 0;
    if (n == state.threads) {
      for (u32 i = 0; i < n; i++) push(state.order[i]);
    } else {
      const bool backwards = state.order[0] != 0;
      for (u32 i = 0; i < n; i++) push(b.ids[backwards ? n - 1 - i : i]);
    }
  }
  if (wait) give_way();
  f->waits = nullptr;
}

inline void sync_threads(int line, int predicate = 0) {
  const u32 rest = state.threads % 32;
  arrive(0, state.threads + (rest ? 32 - rest : 0), true, line, predicate);
}

// ---- operations of a warp
// Waits until all lanes of `mask` have come to the same operation; the last one carries it out for all.
inline void together(u32 mask, Complete operation, const char* name) {
  Fiber* const f = current;
  const u32 number = f->id / 32, lane = f->id % 32;
  Warp& warp = state.warps[number];
  Fiber* const lanes = state.fibers + number * 32;
  mask &= warp.exists;
  if (!(mask >> lane & 1)) EMU_FAIL("%s with a mask %08x that lacks the lane itself", name, mask);
  if (mask & warp.ended) EMU_FAIL("%s waits for lanes %08x of its warp, which have ended", name, mask & warp.ended);
  f->mask = mask;
  f->operation = operation;
  f->waits = name;
  bool complete = true;
  if (mask == warp.exists) {
    warp.arrived |= 1u << lane;
    complete = warp.arrived == mask;
  } else {
    for (u32 i = 0; i < 32 && complete; i++) complete = !(mask >> i & 1) || lanes[i].mask == mask;
  }
  if (!complete) {
    give_way();
    return;
  }
  for (u32 i = 0; i < 32; i++)
    if (mask >> i & 1 && lanes[i].operation != operation)
      EMU_FAIL("lanes of a warp meet in different operations: %s and %s", name, lanes[i].waits);
  operation(lanes, mask);
  if (mask == warp.exists) warp.arrived = 0;
  for (u32 i = 0; i < 32; i++) {
    const u32 other = state.lanes[i];
    if (!(mask >> other & 1)) continue;
    lanes[other].mask = 0;
    lanes[other].waits = nullptr;
    if (other != lane) push(number * 32 + other);
  }
}

// ---- launching
inline void handler(int number, siginfo_t* info, void*) {
  if (!pthread_equal(pthread_self(), state.runner)) {
    if (number == SIGVTALRM)
      pthread_kill(state.runner, number);
    else
      signal(number, SIG_DFL);
    return;
  }
  state.fault = number == SIGVTALRM ? 0 : reinterpret_cast<u64>(info->si_addr);
  siglongjmp(state.jump, number);
}

inline u32 random32(u64& seed) {
  seed = seed * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<u32>(seed >> 33);
}
inline void arrange(u32* ids, u32 n, u64 order) {
  for (u32 i = 0; i < n; i++) ids[i] = order == 1 ? n - 1 - i : i;
  if (order < 2) return;
  u64 seed = order * 0x9e3779b97f4a7c15ull + n;
  for (u32 i = n - 1; i > 0; i--) {
    const u32 j = random32(seed) % (i + 1), t = ids[i];
    ids[i] = ids[j];
    ids[j] = t;
  }
}

inline void run_block(bool hidden) {
  if (__start_emu_shared) memset(__start_emu_shared, POISON, __stop_emu_shared - __start_emu_shared);
  memset(dynamic_memory, POISON, state.smem);
  memset(dynamic_memory + state.smem, UNTOUCHED, GUARD);
  memset(state.warps, 0, sizeof state.warps);
  for (Barrier& b : state.barriers) b.arrived = b.waiting = 0;
  state.head = state.tail = state.ended = state.before_count = 0;
  state.hiding = state.block_waited = false;
  if (hidden) hide();
  state.spins = 0;
  for (u32 i = 0; i < state.threads; i++) {
    prepare(state.fibers[i], i);
    state.warps[i / 32].exists |= 1u << i % 32;
  }
  for (u32 i = 1; i < state.threads; i++) push(state.order[i]);
  current = &state.fibers[state.order[0]];
  from_main(current);
  current = nullptr;
  if (state.hiding && !give_back() && !state.failed) {
    say_where();
    say("what a predecessor writes was written without griddepcontrol.wait");
    state.failed = true;
  }
  if (state.failed) return;
  for (u32 i = 0; i < GUARD; i++)
    if (static_cast<unsigned char>(dynamic_memory[state.smem + i]) != UNTOUCHED) {
      say_where();
      say("written %u bytes past the end of the %u bytes of dynamic shared memory", i, state.smem);
      state.failed = true;
      return;
    }
}

// Runs a grid; not 0: it failed.
inline int run(void (*entry)(void**), Launch& launch) {
  const u32* const grid = launch.grid;
  const u32* const block = launch.block;
  const u32 smem = launch.smem, seconds = launch.seconds;
  const u64 order = launch.order;
  state.entry = entry;
  state.arguments = launch.arguments;
  state.message = launch.message;
  state.room = sizeof launch.message;
  state.grid_dim = {grid[0], grid[1], grid[2]};
  state.block_dim = {block[0], block[1], block[2]};
  state.threads = block[0] * block[1] * block[2];
  state.smem = smem;
  state.failed = false;
  state.fault = 0;
  current = nullptr;
  if (state.threads == 0 || state.threads > MAX_THREADS || smem > DYNAMIC || !grid[0] || !grid[1] || !grid[2] ||
      grid[1] > 65535 || grid[2] > 65535) {
    say("no such launch: %u threads, %u bytes of shared memory, grid %u x %u x %u", state.threads, smem, grid[0], grid[1], grid[2]);
    return 1;
  }
  state.stacks = launch.stacks;
  state.launch = &launch;
  state.hiding = false;
  launch.waited = launch.launched = launch.early = 0;
  arrange(state.order, state.threads, order);
  arrange(state.lanes, 32, order);
  const u32 blocks = grid[0] * grid[1] * grid[2];
  u32* const sequence = static_cast<u32*>(malloc(sizeof(u32) * blocks));
  arrange(sequence, blocks, order);

  static char signal_stack[64 << 10];
  stack_t alternative = {}, before = {};
  alternative.ss_sp = signal_stack;
  alternative.ss_size = sizeof signal_stack;
  sigaltstack(&alternative, &before);
  const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGVTALRM};
  struct sigaction mine = {}, old[5];
  mine.sa_sigaction = handler;
  mine.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&mine.sa_mask);
  state.runner = pthread_self();
  for (int i = 0; i < 5; i++) sigaction(signals[i], &mine, &old[i]);
  itimerval limit = {}, off = {};
  limit.it_value.tv_sec = seconds;
  setitimer(ITIMER_VIRTUAL, &limit, nullptr);
  const int caught = sigsetjmp(state.jump, 1);
  if (caught) {
    say_where();
    if (caught == SIGVTALRM)
      say("still running after %u seconds: a loop that does not end, or a wait for another block", seconds);
    else if (caught == SIGILL)
      say("a misaligned access");
    else if (caught == SIGFPE)
      say("a division by zero");
    else
      say("a forbidden access");
    state.failed = true;
    launch.fault = state.fault;
    if (state.hiding) give_back();
  } else {
    for (u32 i = 0; i < blocks && !state.failed; i++) {
      const u32 at = sequence[i];
      state.block = {at % grid[0], at / grid[0] % grid[1], at / grid[0] / grid[1]};
      // Hiding for some blocks is enough, and quicker.
      run_block(launch.hidden_count && (i < 2 || i % (blocks / 4 + 1) == 0));
    }
  }
  setitimer(ITIMER_VIRTUAL, &off, nullptr);
  for (int i = 0; i < 5; i++) sigaction(signals[i], &old[i], nullptr);
  sigaltstack(&before, nullptr);
  free(sequence);
  return state.failed;
}

// A kernel as a function of the addresses of its arguments, and their sizes.
template <auto F> struct Kernel;
template <class... A, void (*F)(A...)> struct Kernel<F> {
  template <size_t... I> struct Indices {};
  template <size_t N, size_t... I> struct Make : Make<N - 1, N - 1, I...> {};
  template <size_t... I> struct Make<0, I...> { using type = Indices<I...>; };
  template <size_t... I> static void call(void** p, Indices<I...>) {
    F(*static_cast<typename Plain<A>::type*>(p[I])...);
  }
  template <class T> struct Plain { using type = T; };
  template <class T> struct Plain<const T> { using type = T; };
  static void entry(void** p) { call(p, typename Make<sizeof...(A)>::type()); }
  static constexpr u32 sizes[] = {sizeof...(A), sizeof(A)...};
};

struct Listed {
  void (*entry)(void**);
  const u32* sizes;  // how many arguments, then the bytes of each
};
}  // namespace emu
