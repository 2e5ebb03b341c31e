// The scan of Mamba-2 layers (Dao & Gu 2024, section 6), in chunks of 16 tokens at fixed positions.
//
// A token's output is made from the state at the start of its chunk and the chunk's tokens up to it, in matrix
// products of one shape: what is not known yet is zero. So its bits depend neither on how the sequence is cut into
// steps nor on its company. A warp has 16 rows of a head's state, in float32, in registers.
#include "mamba2/scan.cuh"

// out [T, heads * dim], xbc [T, heads * dim + 2 * groups * SIZE]: x, B, C. steps [T, steps_pitch] from the first
// head's column on. log_decay, skip, bias float32 [heads]. state float32 [slots, slot_elements], see `State`. count:
// sequences of the step; slots, kv_lens int32 [sequences], offsets int32 [sequences + 1]. keep: also writes what is
// known of the newest chunk, which is safe where no sequence has more than one token; `scan_keep` does it else.
// CONV: sequences have one token each, and x, B and C come from `conv`; xbc is not read.
// dim % 16 == 0, 2 * dim <= THREADS. Shared memory: 2 stages of CHUNK rows of dim, SIZE, SIZE elements of T, each + PAD.
// Grid: (heads, any number), 2 * dim threads. Decode is bound by reading the state, a long prompt by the latency of
// its chunks, one after the other.
//
// One body of 250 lines, for the registers: with a chunk's five products as functions of their own the kernel for
// states of 128 spills 8 bytes at its 168 (sm_90a), and the wide one takes 201 instead of 199.
template <typename T, int SIZE, int THREADS, bool CONV>
__global__ void __launch_bounds__(THREADS, THREADS > 128 ? 1 : SIZE <= 128 ? 3 : 2)
state_scan(T* out, const T* xbc, const T* steps, const float* __restrict__ log_decay, const float* __restrict__ skip,
           const float* __restrict__ bias, float* state, const int* count, const int* slots, const int* kv_lens,
           const int* offsets, int slot_elements, int steps_pitch, int heads, int dim, int groups, float least, int keep,
           Conv<T> conv) {
  griddep_launch();
  constexpr int PAD = 8;  // elements behind each row in shared memory, against bank conflicts
  constexpr int U = SIZE / 64, VECTORS = SIZE / 8, SP = SIZE + PAD;
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int head = blockIdx.x, group = head / (heads / groups), inner = heads * dim, wide = inner + 2 * groups * SIZE;
  const int XP = dim + PAD, stage_elements = CHUNK * (XP + 2 * SP), pitch = kept_pitch(heads, dim, groups, SIZE);
  const int first_b = inner + group * SIZE, first_c = first_b + groups * SIZE, p0 = warp * 16;
  const int seqs = *count;
  const float decay = -expf(log_decay[head]), head_skip = skip[head], head_bias = bias[head];
  const auto xs = [&](int stage) { return reinterpret_cast<T*>(shared) + stage * stage_elements; };
  const auto bs = [&](int stage) { return xs(stage) + CHUNK * XP; };
  const auto cs = [&](int stage) { return bs(stage) + CHUNK * SP; };
  const int x_row = threadIdx.x / (dim / 8), x_vector = threadIdx.x % (dim / 8);  // a vector of x each

  bool waited = false;
  for (int seq = blockIdx.y; seq < seqs; seq += gridDim.y) {
    const Piece piece = piece_of(seq, offsets, kv_lens);
    float* const slot = state + (size_t)slots[seq] * slot_elements;
    float* const rows = slot + ((size_t)head * dim + p0) * SIZE;
    T* const kept = reinterpret_cast<T*>(slot + (size_t)inner * SIZE);
    int chunk = piece.start / CHUNK;
    const int last = (piece.end - 1) / CHUNK, known = piece.start % CHUNK;

    // Tokens that earlier steps brought to the first chunk.
    const auto recall = [&]() {
      if (x_row < known) cp_async16(smem(xs(0) + x_row * XP + x_vector * 8), kept + (size_t)x_row * pitch + head * dim + x_vector * 8);
      for (int i = threadIdx.x; i < known * VECTORS; i += blockDim.x) {
        const int r = i / VECTORS, c = i % VECTORS * 8;
        cp_async16(smem(bs(0) + r * SP + c), kept + (size_t)r * pitch + first_b + c);
      }
    };
    // This step's tokens of a chunk, zeros behind them.
    const auto fetch = [&](int chunk, int stage) {
      const int base = chunk * CHUNK - piece.start;  // of the chunk's first token among this step's
      const int end = piece.end - piece.start;
      const auto row = [&](int r) { return xbc + (size_t)(piece.row + min(max(base + r, 0), end - 1)) * wide; };
      if (base + x_row >= 0)
        cp_async16(smem(xs(stage) + x_row * XP + x_vector * 8), row(x_row) + head * dim + x_vector * 8, base + x_row < end ? 16 : 0);
      for (int i = threadIdx.x; i < CHUNK * VECTORS; i += blockDim.x) {
        const int r = i / VECTORS, c = i % VECTORS * 8;
        if (base + r >= 0) cp_async16(smem(bs(stage) + r * SP + c), row(r) + first_b + c, base + r < end ? 16 : 0);
        cp_async16(smem(cs(stage) + r * SP + c), row(r) + first_c + c, base + r >= 0 && base + r < end ? 16 : 0);
      }
      cp_async_commit();
    };
    // The time step of token lane % 16 of a chunk, zero where it is not known.
    const auto step_of = [&](int chunk) {
      const int position = chunk * CHUNK + lane % CHUNK;
      if (position >= piece.end) return 0.f;
      const T raw = position >= piece.start ? steps[(size_t)(piece.row + position - piece.start) * steps_pitch + head]
                                            : kept[(size_t)(position % CHUNK) * pitch + inner + groups * SIZE + head];
      return time_step(to_float(raw), head_bias, least);
    };

    State<SIZE> h;
    if (chunk > 0)
      h.load(rows, lane);
    else
      h.clear();
    recall();
    const bool leads = head % (heads / groups) == 0;  // the head that writes what its group shares
    float step;
    if constexpr (CONV) {
      constexpr int BC = 2 * SIZE;
      const int columns = dim + BC;
      const auto cell = [&](int r, int c) {  // column c of x, B and C in the stage
        return c < dim ? xs(0) + r * XP + c : c < dim + SIZE ? bs(0) + r * SP + c - dim : cs(0) + r * SP + c - dim - SIZE;
      };
      const auto column_of = [&](int c) { return c < dim ? head * dim + c : c < dim + SIZE ? first_b + c - dim : first_c + c - dim - SIZE; };
      T* const inputs = reinterpret_cast<T*>(conv.state + (size_t)slots[seq] * conv.slot_elements);
      for (int i = threadIdx.x; i < CHUNK * columns / 8; i += blockDim.x) {  // zeros where no token is
        const int r = i / (columns / 8), c = i % (columns / 8) * 8;
        if (r > known || (r < known && c >= dim + SIZE)) *reinterpret_cast<uint4*>(cell(r, c)) = make_uint4(0, 0, 0, 0);
      }
      bool begun = false;
      const auto begin = [&]() {
        if (begun) return;
        if (!waited) griddep_wait();
        step = step_of(chunk);
        begun = waited = true;
      };
      for (int i = threadIdx.x; i < columns / 4; i += blockDim.x) {
        const int c = i * 4, column = column_of(c);
        Four<T> four;
        four.recall(conv, inputs, wide, column, piece.start);
        begin();
        const uint2 x = *reinterpret_cast<const uint2*>(conv.x + (size_t)piece.row * conv.pitch + column);
        *reinterpret_cast<uint2*>(cell(known, c)) = four.output(x);
        if (c < dim || leads) *reinterpret_cast<uint2*>(inputs + (size_t)kept_row<TAPS>(piece.start) * wide + column) = x;
      }
      begin();
      cp_async_commit();
    } else {
      if (!waited) griddep_wait();
      waited = true;
      fetch(chunk, 0);
      step = step_of(chunk);
    }
    bool moved = false;
    for (int stage = 0; chunk <= last; chunk++, stage ^= 1) {
      cp_async_wait<0>();
      __syncthreads();  // the chunk is here, and everyone has left the other stage
      float next_step = 0.f;
      if (!CONV && chunk < last) {
        fetch(chunk + 1, stage ^ 1);
        next_step = step_of(chunk + 1);
      }
      const T *const x = xs(stage), *const b = bs(stage), *const c = cs(stage);

      // total: the sum of steps * decay up to each token. Only differences matter, which may be far smaller.
      double total = (double)(step * decay);
#pragma unroll
      for (int o = 1; o < CHUNK; o <<= 1) {
        const double before = __shfl_up_sync(~0u, total, o, CHUNK);
        if (lane % CHUNK >= o) total += before;
      }
      const double total_end = __shfl_sync(~0u, total, CHUNK - 1);
      const double total_of[2] = {__shfl_sync(~0u, total, g), __shfl_sync(~0u, total, g + 8)};

      // near[t][j] = (C_t B_j) exp(total_t - total_j) step_j for j <= t, as operand a; `left` weighs x for the state.
      float near[2][4] = {}, left[2][2];
#pragma unroll
      for (int k = 0; k < SIZE / 16; k++) {
        u32 fc[4], fb[4];
        ldmatrix_x4(fc, smem(c + (lane % 16) * SP + k * 16 + lane / 16 * 8));
        ldmatrix_x4(fb, smem(b + (lane % 8 + lane / 16 * 8) * SP + k * 16 + lane / 8 % 2 * 8));
        mma_16816(near[0], fc, {fb[0], fb[1]}, T());
        mma_16816(near[1], fc, {fb[2], fb[3]}, T());
      }
      u32 near_hi[2][4], near_lo[2][4];
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int j = 8 * n + 2 * q + e;
          const double total_j = __shfl_sync(~0u, total, j);
          const float step_j = __shfl_sync(~0u, step, j);
          left[n][e] = __fmul_rn(__expf((float)(total_end - total_j)), step_j);
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const float between = __expf((float)(total_of[half] - total_j));
            const float value = j <= g + 8 * half ? __fmul_rn(near[n][2 * half + e], __fmul_rn(between, step_j)) : 0.f;
            split(value, near_hi[n][half + 2 * e], near_lo[n][half + 2 * e]);
          }
        }

      // What the chunk's tokens add to each other.
      u32 fx[2][2][2];  // x of tokens 8 n + 2 q + e, row p0 + g + 8 half
      float y[2][4] = {}, far_hi[2][4] = {}, far_lo[2][4] = {};
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
          for (int e = 0; e < 2; e++) fx[n][e][half] = load1(x + (8 * n + 2 * q + e) * XP + p0 + g + 8 * half);
          mma_1688(y[half], near_hi[n], {fx[n][0][half], fx[n][1][half]});
          mma_1688(y[half], near_lo[n], {fx[n][0][half], fx[n][1][half]});
        }

      // What the state before the chunk gives.
#pragma unroll
      for (int u = 0; u < U; u++) {
        u32 fc[2][2][8];  // [token half][e]: C of token g + 8 half, columns 64 u + 16 q + 8 e ..
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int e = 0; e < 2; e++) load8(fc[half][e], c + (g + 8 * half) * SP + 64 * u + 16 * q + 8 * e);
#pragma unroll
        for (int v = 0; v < 8; v++) {
          const u32 a[4] = {fc[0][0][v], fc[1][0][v], fc[0][1][v], fc[1][1][v]};
#pragma unroll
          for (int half = 0; half < 2; half++) {
            u32 hi[2], lo[2];
            split(h.h[u][v][2 * half], hi[0], lo[0]);
            split(h.h[u][v][2 * half + 1], hi[1], lo[1]);
            mma_1688(far_hi[half], a, hi);
            mma_1688(far_lo[half], a, lo);
          }
        }
      }

#pragma unroll
      for (int row = 0; row < 2; row++) {
        const int t = g + 8 * row, position = chunk * CHUNK + t;
        if (position < piece.start || position >= piece.end) continue;
        const float fade = __expf((float)total_of[row]);
        T* const target = out + (size_t)(piece.row + position - piece.start) * inner + head * dim;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int p = p0 + 8 * half + 2 * q;
          const float2 own = unpack2<T>(*reinterpret_cast<const u32*>(x + t * XP + p));
          float r[2];
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const float far = __fadd_rn(far_hi[half][2 * row + e], far_lo[half][2 * row + e]);
            r[e] = fmaf(head_skip, e ? own.y : own.x, fmaf(far, fade, y[half][2 * row + e]));
          }
          *reinterpret_cast<u32*>(target + p) = pack2<T>(r[0], r[1]);
        }
      }

      if (piece.end >= (chunk + 1) * CHUNK) {  // all tokens are known: the state moves behind the chunk
        moved = true;
        const float fade = __expf((float)total_end);
        u32 hi[2][4], lo[2][4];
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
          for (int e = 0; e < 2; e++)
#pragma unroll
            for (int half = 0; half < 2; half++)
              split(__fmul_rn(__uint_as_float(fx[n][e][half]), left[n][e]), hi[n][half + 2 * e], lo[n][half + 2 * e]);
#pragma unroll
        for (int u = 0; u < U; u++) {
          u32 fb[2][2][8];  // B of tokens 8 n + 2 q + e, columns 64 u + 8 g ..
#pragma unroll
          for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) load8(fb[n][e], b + (8 * n + 2 * q + e) * SP + 64 * u + 8 * g);
#pragma unroll
          for (int v = 0; v < 8; v++) {
            float(&d)[4] = h.h[u][v];
#pragma unroll
            for (int i = 0; i < 4; i++) d[i] = __fmul_rn(d[i], fade);
#pragma unroll
            for (int n = 0; n < 2; n++) {
              mma_1688(d, hi[n], {fb[n][0][v], fb[n][1][v]});
              mma_1688(d, lo[n], {fb[n][0][v], fb[n][1][v]});
            }
          }
        }
      }
      step = next_step;
      if (CONV) break;  // one token, one chunk
    }
    if (moved) h.store(rows, lane);
    if (keep) {  // one token, in stage 0
      const int r = piece.start % CHUNK;
      T* const target = kept + (size_t)r * pitch;
      const auto copy = [&](T* to, const T* from) { *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from); };
      if (x_row == r) copy(target + head * dim + x_vector * 8, xs(0) + r * XP + x_vector * 8);
      if (leads && threadIdx.x < VECTORS)
        copy(target + first_b + threadIdx.x * 8, bs(0) + r * SP + threadIdx.x * 8);
      if (threadIdx.x == 0) target[inner + groups * SIZE + head] = steps[(size_t)piece.row * steps_pitch + head];
    }
    __syncthreads();  // the stages are free for the next sequence
  }
  if (!waited && blockIdx.x == 0 && blockIdx.y == 0) griddep_wait();
}

// Writes what is known of each sequence's newest chunk to its slot, for steps with prompts; arguments as above. A
// full chunk is in the state already.
// Grid: (any number, any number), threads: any number.
template <typename T>
__global__ void scan_keep(const T* xbc, const T* steps, float* state, const int* count, const int* slots, const int* kv_lens,
                          const int* offsets, int slot_elements, int steps_pitch, int heads, int dim, int groups, int size) {
  griddep_launch();
  const int inner = heads * dim, known = inner + groups * size, wide = known + groups * size;
  const int pitch = kept_pitch(heads, dim, groups, size), seqs = *count;
  griddep_wait();
  for (int seq = blockIdx.y; seq < seqs; seq += gridDim.y) {
    const Piece piece = piece_of(seq, offsets, kv_lens);
    if (piece.end % CHUNK == 0) continue;
    T* const kept = reinterpret_cast<T*>(state + (size_t)slots[seq] * slot_elements + (size_t)inner * size);
    for (int position = max(piece.start, piece.end / CHUNK * CHUNK); position < piece.end; position++) {
      const size_t row = piece.row + position - piece.start;
      T* const target = kept + (size_t)(position % CHUNK) * pitch;
      for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < known / 8; i += gridDim.x * blockDim.x)
        *reinterpret_cast<uint4*>(target + i * 8) = load_l2(xbc + row * wide + i * 8);
      for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < heads; i += gridDim.x * blockDim.x)
        target[known + i] = steps[row * steps_pitch + i];
    }
  }
}
