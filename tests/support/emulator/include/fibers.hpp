// Who runs: the scheduler of a block's fibers, griddepcontrol, barriers, and operations that a warp does together.
#pragma once

#include "state.hpp"

namespace emu {
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
}  // namespace emu
