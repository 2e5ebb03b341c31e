// The threads of a block as fibers of one OS thread: what is known of them, switching between them, and failing.
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
}  // namespace emu
