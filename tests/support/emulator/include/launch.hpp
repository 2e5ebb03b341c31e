// A grid, block by block, with a handler for what the processor refuses; and kernels as functions of their arguments.
#pragma once

#include "fibers.hpp"

namespace emu {
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
