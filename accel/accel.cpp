// An int8 engine for llama.cpp on x86 CPUs: a ggml backend of device type ACCEL that takes over the matrix products of
// the layers, what follows them at once (bias, GELU, GEGLU), and attention. llama.cpp offers every operation to it before
// the CPU backend; what it does not take stays there.
//
// Weights become int8 once, with a scale per output row, in oneDNN's own layout. Activations become int8 with a scale
// per token. The product is exact in int32; scales, bias and GELU are applied while a block of it is in the cache.
// Attention is float32, over the tokens that a pair may see. So its score does not depend on what else is in its batch.
//
// A value that is not finite makes its token's scale NaN, and so the whole row: a failure is never a score.
//
// ggml-backend-impl.h (llama-cpp-python's source distribution) says what each function of the interface must do.

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-impl.h"
#include "ggml.h"

#include <oneapi/dnnl/dnnl.hpp>
#include <omp.h>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <unordered_map>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
// The loops below are compiled for each of these; the loader picks what the CPU has.
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))

namespace {

constexpr int64_t LARGEST_OUTPUT = 65536;  // a vocabulary's matrix is used for a few rows: it is not worth its copy
constexpr int64_t BLOCK_ROWS = 256;        // more are multiplied block by block
constexpr int64_t ROW_STEP = 32;           // the rows of a kernel: one for each number of rows would take long to make
constexpr int64_t BLOCK_BYTES = 512 << 10; // of weights: half of a second-level cache

std::atomic<size_t> copied_bytes{0};

// What the contexts that this thread makes from now on do.
struct Options {
    bool is_used = false;
    bool is_strict = false;        // activations in two int8 parts
    bool gives_back_pages = false; // of the mapped file, once their matrix is copied
};
thread_local Options options;

// -- int8 -------------------------------------------------------------------------------------------------------------

constexpr float PARTS = 254.0f;  // of a step: half a step becomes 127

// for |value| <= 127
inline __attribute__((always_inline)) int8_t nearest(float value) {
    const float shifted = value + 12582912.0f;  // 1.5 x 2^23: the lowest byte is the nearest integer
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return (int8_t) bits;
}

// The scale with which the row's largest value becomes 127; NaN where a value is not finite, 0 for a row of zeroes.
VECTORISED float scale_of(const float * row, int64_t n) {
    float largest = 0.0f, poison = 0.0f;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
    for (int64_t i = 0; i < n; i++) {
        largest = std::max(largest, std::fabs(row[i]));
        poison += row[i] * 0.0f;  // 0, or NaN for NaN and infinities
    }
    return largest / 127.0f + poison;
}

// rest: if there is one, what rounding took away, in 254ths of a step.
VECTORISED void quantise(const float * row, int64_t n, float scale, int8_t * out, int8_t * rest) {
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;  // 0 for NaN too: its scale spoils the whole row
    if (!std::isfinite(inverse)) {                              // a denormal scale
        std::memset(out, 0, n);
        if (rest) std::memset(rest, 0, n);
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = nearest(row[i] * inverse);
    if (rest) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) rest[i] = nearest((row[i] * inverse - (float) out[i]) * PARTS);
    }
}

// 2^power: the whole part by the bits of a float, the rest by a polynomial (the Taylor series of 2^r for |r| <= 1/2; its
// error is below 2e-7 of the value). 0 below 2^-126, and not more than 2^126.
inline __attribute__((always_inline)) float power_of_two(float power) {
    const float bounded = std::min(126.0f, std::max(-126.0f, power));
    const float whole = (bounded + 12582912.0f) - 12582912.0f;  // rounds to the nearest
    const float r = bounded - whole;
    const float fraction = 1.0f + r * (0.693147182f + r * (0.240226507f + r * (0.0555041087f + r * (0.00961812911f +
                           r * (0.00133335581f + r * 0.000154035304f)))));
    const int32_t bits = ((int32_t) whole + 127) << 23;
    float two_to_whole;
    std::memcpy(&two_to_whole, &bits, sizeof bits);
    return power < -126.0f ? 0.0f : fraction * two_to_whole;
}

// ggml's own approximation of GELU (ggml_gelu): 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), which is
// x / (1 + exp(-2 sqrt(2/pi) (x + 0.044715 x^3))).
inline __attribute__((always_inline)) float gelu(float x) {
    return x / (1.0f + power_of_two(-2.302208198f * x * (1.0f + 0.044715f * x * x)));
}

enum Epilogue { PLAIN, BIAS, BIAS_GELU, GEGLU };  // what follows the product

// One row of a block: int32 products, perhaps in the place of `out`, become floats. rests: the products of what rounding
// took away, or null. extra: the bias, or GEGLU's other factor.
VECTORISED void finish_row(
    const int32_t * products, const int32_t * rests, int64_t n, float row_scale, const float * column_scales,
    const float * extra, Epilogue epilogue, float * out
) {
    if (rests) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            out[i] = ((float) products[i] + (float) rests[i] / PARTS) * (row_scale * column_scales[i]);
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] = (float) products[i] * (row_scale * column_scales[i]);
    }
    switch (epilogue) {
        case PLAIN:
            break;
        case BIAS:
#pragma omp simd
            for (int64_t i = 0; i < n; i++) out[i] += extra[i];
            break;
        case BIAS_GELU:
#pragma omp simd
            for (int64_t i = 0; i < n; i++) out[i] = gelu(out[i] + extra[i]);
            break;
        case GEGLU:
#pragma omp simd
            for (int64_t i = 0; i < n; i++) out[i] = gelu(out[i]) * extra[i];
            break;
    }
}

// -- products ---------------------------------------------------------------------------------------------------------

// A weight matrix [k, n] in blocks of columns, each as oneDNN wants it, and the scale of each of the n outputs.
struct Weights {
    int64_t columns;  // in a block
    std::vector<dnnl::memory> blocks;
    std::vector<float> scales;
    size_t counted_bytes = 0;

    void count() {
        for (const auto & block : blocks) counted_bytes += block.get_desc().get_size();
        copied_bytes += counted_bytes;
    }
    ~Weights() { copied_bytes -= counted_bytes; }
};

// A product is cut into blocks of rows and columns whose operands fit a core's second-level cache. Each thread
// multiplies one block and finishes it while it is still there; oneDNN itself uses no threads.
class Products {
  public:
    Products() : engine(dnnl::engine::kind::cpu, 0), stream(engine) {}

    int n_threads = 1;

    // out [rows, n] = epilogue(in [rows, k] x weights); extra: the bias [n], or what GEGLU multiplies with [rows, n].
    void multiply(
        const ggml_tensor * matrix, const float * in, int64_t rows, const float * extra, Epilogue epilogue, float * out
    ) {
        const int64_t k = matrix->ne[0], n = matrix->ne[1];
        if (rows == 0) {
            return;
        }
        const Weights & weights = weights_of(matrix);
        quantise_rows(in, rows, k);
        const int64_t n_column_blocks = weights.blocks.size(), n_row_blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
        const int64_t block_size = BLOCK_ROWS * weights.columns;
        products.resize(std::max(products.size(), (size_t) (2 * n_threads * block_size)));
        std::atomic<bool> failed{false};
#pragma omp parallel for schedule(dynamic) num_threads(n_threads)
        for (int64_t block = 0; block < n_row_blocks * n_column_blocks; block++) {
            const int64_t first_row = block / n_column_blocks * BLOCK_ROWS, column_block = block % n_column_blocks;
            const int64_t first_column = column_block * weights.columns;
            const int64_t block_rows = std::min(BLOCK_ROWS, rows - first_row);
            const int64_t block_columns = std::min(weights.columns, n - first_column);
            int32_t * own = products.data() + 2 * omp_get_thread_num() * block_size;
            int32_t * own_rests = rests.empty() ? nullptr : own + block_size;
            try {
                const dnnl::memory & block_weights = weights.blocks[column_block];
                execute(values.data() + first_row * k, block_weights, block_rows, k, block_columns, own);
                if (own_rests) {
                    execute(rests.data() + first_row * k, block_weights, block_rows, k, block_columns, own_rests);
                }
            } catch (const std::exception &) {
                failed = true;
                continue;
            }
            for (int64_t row = 0; row < block_rows; row++) {
                const int64_t place = (first_row + row) * n + first_column;
                const float * row_extra = extra ? extra + (epilogue == GEGLU ? place : first_column) : nullptr;
                finish_row(own + row * block_columns, own_rests ? own_rests + row * block_columns : nullptr, block_columns,
                           scales[first_row + row], &weights.scales[first_column], row_extra, epilogue, out + place);
            }
        }
        if (failed) {
            throw std::runtime_error("oneDNN could not multiply");
        }
    }

    // The activations that were made int8 last are used again by the products that read the same tensor (query, key,
    // value), until a new graph or the result of a node may hold other values at the same place.
    void forget_activations() { last_in = nullptr; }
    void forget_activations_in(const ggml_tensor * written) {
        const char *first = (const char *) written->data, *start = (const char *) last_in;
        const char * end = start + last_rows * last_k * sizeof(float);
        if (first < end && start < first + ggml_nbytes(written)) {
            forget_activations();
        }
    }

  private:
    using dt = dnnl::memory::data_type;
    using tag = dnnl::memory::format_tag;
    using Shape = std::tuple<int64_t, int64_t, int64_t>;  // rows, k, columns

    static int64_t rounded_up(int64_t rows) { return (rows + ROW_STEP - 1) / ROW_STEP * ROW_STEP; }

    void quantise_rows(const float * in, int64_t rows, int64_t k) {
        if (in == last_in && rows == last_rows && k == last_k) {
            return;
        }
        values.resize(std::max(values.size(), (size_t) (rounded_up(rows) * k)));  // what follows the last row is ignored
        rests.resize(is_strict ? values.size() : 0);
        scales.resize(std::max(scales.size(), (size_t) rows));
#pragma omp parallel for schedule(static) num_threads(n_threads)
        for (int64_t row = 0; row < rows; row++) {
            scales[row] = scale_of(in + row * k, k);
            int8_t * rest = rests.empty() ? nullptr : rests.data() + row * k;
            quantise(in + row * k, k, scales[row], values.data() + row * k, rest);
        }
        last_in = in, last_rows = rows, last_k = k;
    }

    const Weights & weights_of(const ggml_tensor * tensor) {
        auto & known = prepared[tensor->data];
        if (!known) {
            known = prepare(tensor);
        }
        return *known;
    }

    std::unique_ptr<Weights> prepare(const ggml_tensor * tensor) {
        const int64_t k = tensor->ne[0], n = tensor->ne[1];
        const auto to_float = ggml_get_type_traits(tensor->type)->to_float;  // none for F32
        std::vector<int8_t> rows(n * k);
        std::vector<float> scratch(to_float ? n_threads * k : 0);
        auto made = std::make_unique<Weights>();
        made->scales.resize(n);
#pragma omp parallel for schedule(static) num_threads(n_threads)
        for (int64_t row = 0; row < n; row++) {
            const void * source = (const char *) tensor->data + row * tensor->nb[1];
            const float * wide = (const float *) source;
            if (to_float) {
                float * own = scratch.data() + omp_get_thread_num() * k;
                to_float(source, own, k);
                wide = own;
            }
            made->scales[row] = scale_of(wide, k);
            quantise(wide, k, made->scales[row], rows.data() + row * k, nullptr);
        }
        // as many columns as half the cache holds, but something to do for every thread
        const int64_t fitting = BLOCK_BYTES / k, share = (n + n_threads - 1) / n_threads;
        made->columns = std::max<int64_t>(64, (std::min(fitting, share) + 63) / 64 * 64);
        for (int64_t first = 0; first < n; first += made->columns) {
            const int64_t columns = std::min(made->columns, n - first);
            make_kernels(k, columns);
            dnnl::memory plain({{k, columns}, dt::s8, tag::ba}, engine, rows.data() + first * k);
            made->blocks.emplace_back(layout_of(k, columns), engine);
            dnnl::reorder(plain, made->blocks.back()).execute(stream, plain, made->blocks.back());
            stream.wait();
        }
        made->count();
        drop_pages(tensor);
        return made;
    }

    // The mapped file's pages under a matrix that was copied are idle from now on; the kernel may have them back. They
    // are read again from the file if anybody asks.
    void drop_pages(const ggml_tensor * tensor) const {
#ifdef __linux__
        const bool is_mapped =
            tensor->buffer && std::strstr(ggml_backend_buffer_name(tensor->buffer), "Mapped") != nullptr;
        if (!gives_back_pages || !is_mapped) {
            return;
        }
        const uintptr_t page = sysconf(_SC_PAGESIZE), start = (uintptr_t) tensor->data;
        const uintptr_t first = (start + page - 1) / page * page, last = (start + ggml_nbytes(tensor)) / page * page;
        if (last > first) {
            madvise((void *) first, last - first, MADV_DONTNEED);
        }
#else
        (void) tensor;
#endif
    }

    dnnl::matmul::primitive_desc describe(
        int64_t rows, int64_t k, int64_t columns, const dnnl::memory::desc & weights
    ) const {
        dnnl::primitive_attr attributes;
        attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);  // the library's own is not for several threads
        return {engine, {{rows, k}, dt::s8, tag::ab}, weights, {{rows, columns}, dt::s32, tag::ab}, attributes};
    }

    // The layout that the kernel for a whole block of rows wants; those for fewer are made to take the same.
    dnnl::memory::desc layout_of(int64_t k, int64_t columns) const {
        return describe(BLOCK_ROWS, k, columns, {{k, columns}, dt::s8, tag::any}).weights_desc();
    }

    void make_kernels(int64_t k, int64_t columns) {
        omp_set_num_threads(1);  // a kernel that is made for one thread is run by one
        for (int64_t rows = ROW_STEP; rows <= BLOCK_ROWS; rows += ROW_STEP) {
            if (!kernels.count({rows, k, columns})) {
                const auto made = describe(rows, k, columns, layout_of(k, columns));
                kernels.emplace(Shape{rows, k, columns}, made);
                scratchpad_bytes = std::max(scratchpad_bytes, made.scratchpad_desc().get_size());
            }
        }
        omp_set_num_threads(n_threads);
    }

    // out [rows, columns] = in [rows, k] x weights. What is read and written is rounded up to a kernel's rows.
    void execute(
        const int8_t * in, const dnnl::memory & weights, int64_t rows, int64_t k, int64_t columns, int32_t * out
    ) {
        thread_local std::vector<char> scratchpad;
        scratchpad.resize(std::max(scratchpad.size(), scratchpad_bytes + 64));
        void * aligned = (void *) (((uintptr_t) scratchpad.data() + 63) / 64 * 64);
        dnnl::stream own(engine);
        rows = rounded_up(rows);
        kernels.at({rows, k, columns}).execute(own, {
            {DNNL_ARG_SRC, {{{rows, k}, dt::s8, tag::ab}, engine, const_cast<int8_t *>(in)}},
            {DNNL_ARG_WEIGHTS, weights},
            {DNNL_ARG_DST, {{{rows, columns}, dt::s32, tag::ab}, engine, out}},
            {DNNL_ARG_SCRATCHPAD, {{{(int64_t) scratchpad_bytes}, dt::u8, tag::a}, engine, aligned}},
        });
        own.wait();
    }

    const bool is_strict = options.is_strict, gives_back_pages = options.gives_back_pages;
    dnnl::engine engine;
    dnnl::stream stream;
    std::unordered_map<const void *, std::unique_ptr<Weights>> prepared;  // by the address of the mapped matrix
    std::map<Shape, dnnl::matmul> kernels;
    size_t scratchpad_bytes = 0;
    std::vector<int8_t> values;     // the activations, [rows, k]
    std::vector<int8_t> rests;      // what rounding took away, in the strict mode
    std::vector<float> scales;      // of each row
    std::vector<int32_t> products;  // of each thread: those of a block, and those of its rests
    const float * last_in = nullptr;
    int64_t last_rows = 0, last_k = 0;
};

// -- attention --------------------------------------------------------------------------------------------------------

constexpr int64_t TILE = 24;   // query tokens that are attended with together
constexpr int64_t BLOCK = 32;  // key tokens that are left out together when nobody in the tile may see them
constexpr int64_t STEP_ROWS = 6, STEP_COLUMNS = 16;  // of a product's innermost loop: its sums stay in registers

constexpr uint16_t MINUS_INFINITY = 0xfc00;

// half-precision floats, as ggml keeps keys, values and masks
VECTORISED void widen(const uint16_t * halves, int64_t n, float * out) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const uint32_t exponent = halves[i] & 0x7c00u, sign = (uint32_t) (halves[i] & 0x8000u) << 16;
        uint32_t bits = (uint32_t) (halves[i] & 0x7fffu) << 13;
        float value;
        std::memcpy(&value, &bits, sizeof bits);
        value *= 0x1p112f;  // the difference of the exponents' biases; right for denormals too
        std::memcpy(&bits, &value, sizeof bits);
        bits |= sign | (exponent == 0x7c00u ? 0x7f800000u : 0u);  // infinities and NaN stay what they are
        std::memcpy(&out[i], &bits, sizeof bits);
    }
}

// c [6, 16] += a [6, k] x b [k, 16]
VECTORISED void multiply_add(
    const float * a, int64_t a_distance, const float * b, int64_t b_distance, int64_t k, float * c, int64_t c_distance
) {
    typedef float Wide __attribute__((vector_size(4 * STEP_COLUMNS), aligned(4), may_alias));
    Wide sums[STEP_ROWS];
#pragma GCC unroll 6
    for (int64_t row = 0; row < STEP_ROWS; row++) sums[row] = *(const Wide *) (c + row * c_distance);
    for (int64_t i = 0; i < k; i++) {
        const Wide right = *(const Wide *) (b + i * b_distance);
#pragma GCC unroll 6
        for (int64_t row = 0; row < STEP_ROWS; row++) sums[row] += a[row * a_distance + i] * right;
    }
#pragma GCC unroll 6
    for (int64_t row = 0; row < STEP_ROWS; row++) *(Wide *) (c + row * c_distance) = sums[row];
}

// exp(row + mask - their largest), in place. Returns the sum; NaN where a score is not a number.
VECTORISED float exponentials(float * row, const float * mask, int64_t n) {
    float largest = -INFINITY, sum = 0.0f, poison = 0.0f;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
    for (int64_t i = 0; i < n; i++) {
        row[i] += mask[i];
        largest = std::max(largest, row[i]);
        poison += row[i] == row[i] ? 0.0f : row[i];
    }
    if (largest == -INFINITY) {  // nothing may be seen, or there are no numbers
        std::memset(row, 0, n * sizeof(float));
        return poison;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        row[i] = power_of_two((row[i] - largest) * 1.44269504f);
        sum += row[i];
    }
    return sum + poison;
}

VECTORISED void scale_row(const float * row, int64_t n, float factor, float * out) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = row[i] * factor;
}

// Softmax attention in float32. llama.cpp packs many pairs into a batch and masks what belongs to others; ggml computes
// all of it, here blocks of keys that a whole tile of queries must not see are left out.
class Attention {
  public:
    void compute(const ggml_tensor * op, int n_threads) {
        const ggml_tensor *q = op->src[0], *k = op->src[1];
        const int64_t d = q->ne[0], n_tokens = q->ne[1], n_heads = q->ne[2], n_kv_heads = k->ne[2];
        n_blocks = (k->ne[1] + BLOCK - 1) / BLOCK;
        const int64_t n_tiles = (n_tokens + TILE - 1) / TILE, n_kept = n_kv_heads * n_blocks;
        // nothing is allocated in the parallel part: an exception could not leave it
        keys.resize(std::max(keys.size(), (size_t) (n_kept * BLOCK * d)));
        values.resize(keys.size());
        seen.resize(std::max(seen.size(), (size_t) (n_tiles * n_blocks)));
        n_seen.resize(std::max(n_seen.size(), (size_t) n_tiles));
        scratch.resize(std::max(scratch.size(), (size_t) (n_threads * scratch_floats(d))));
#pragma omp parallel num_threads(n_threads)
        {
            float * own = &scratch[omp_get_thread_num() * scratch_floats(d)];
#pragma omp for schedule(static) nowait
            for (int64_t tile = 0; tile < n_tiles; tile++) find_seen(op, tile);
#pragma omp for schedule(static)
            for (int64_t item = 0; item < n_kept; item++) keep(op, item, own);
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < n_heads * n_tiles; item++) attend(op, item / n_heads, item % n_heads, own);
        }
    }

  private:
    int64_t scratch_floats(int64_t d) const { return 2 * TILE * d + (TILE + 1) * n_blocks * BLOCK + BLOCK * d; }

    static const uint16_t * halves(const ggml_tensor * tensor, int64_t token, int64_t head) {
        const char * row = (const char *) tensor->data + token * tensor->nb[1] + head * tensor->nb[2];
        return (const uint16_t *) (const void *) row;
    }

    // Which blocks of keys a token of the tile may see.
    void find_seen(const ggml_tensor * op, int64_t tile) {
        const int64_t first = tile * TILE, n = std::min(TILE, op->src[0]->ne[1] - first), n_kv = op->src[1]->ne[1];
        int32_t * own = &seen[tile * n_blocks];
        n_seen[tile] = 0;
        for (int64_t block = 0; block < n_blocks; block++) {
            bool is_seen = false;
            for (int64_t row = 0; row < n && !is_seen; row++) {
                const uint16_t * mask = halves(op->src[3], first + row, 0) + block * BLOCK;
                for (int64_t i = 0; i < std::min(BLOCK, n_kv - block * BLOCK); i++) is_seen |= mask[i] != MINUS_INFINITY;
            }
            if (is_seen) {
                own[n_seen[tile]++] = (int32_t) block;
            }
        }
    }

    // One block of one head: its keys transposed, [d, BLOCK], and its values, [BLOCK, d]; zeroes after the last.
    void keep(const ggml_tensor * op, int64_t item, float * own) {
        const int64_t d = op->src[0]->ne[0], head = item / n_blocks, first = item % n_blocks * BLOCK;
        const int64_t n = std::min(BLOCK, op->src[1]->ne[1] - first);
        float *transposed = &keys[item * BLOCK * d], *straight = &values[item * BLOCK * d];
        std::memset(own, 0, BLOCK * d * sizeof(float));
        std::memset(straight, 0, BLOCK * d * sizeof(float));
        for (int64_t i = 0; i < n; i++) {
            widen(halves(op->src[1], first + i, head), d, own + i * d);
            widen(halves(op->src[2], first + i, head), d, straight + i * d);
        }
        for (int64_t j = 0; j < d; j++) {
            for (int64_t i = 0; i < BLOCK; i++) transposed[j * BLOCK + i] = own[i * d + j];
        }
    }

    // One head of one tile: out = softmax(scale q k^T + mask) v.
    void attend(const ggml_tensor * op, int64_t tile, int64_t head, float * own) {
        const ggml_tensor *q = op->src[0], *k = op->src[1];
        const int64_t d = q->ne[0], first = tile * TILE, n = std::min(TILE, q->ne[1] - first);
        const int64_t width = n_seen[tile] * BLOCK, offset = head / (q->ne[2] / k->ne[2]) * n_blocks * BLOCK * d;
        const int32_t * blocks = &seen[tile * n_blocks];
        float *queries = own, *out = queries + TILE * d, *scores = out + TILE * d, *mask = scores + TILE * width;
        float scale, sums[TILE];
        std::memcpy(&scale, op->op_params, sizeof scale);
        std::memset(own, 0, (2 * TILE * d + TILE * width) * sizeof(float));
        for (int64_t row = 0; row < n; row++) {
            const char * from = (const char *) q->data + (first + row) * q->nb[1] + head * q->nb[2];
            scale_row((const float *) (const void *) from, d, scale, queries + row * d);
        }
        for (int64_t i = 0; i < n_seen[tile]; i++) {
            const float * block = &keys[offset + blocks[i] * BLOCK * d];
            for (int64_t row = 0; row < n; row += STEP_ROWS) {
                for (int64_t column = 0; column < BLOCK; column += STEP_COLUMNS) {
                    multiply_add(queries + row * d, d, block + column, BLOCK, d, scores + row * width + i * BLOCK + column,
                                 width);
                }
            }
        }
        for (int64_t row = 0; row < n; row++) {
            std::fill(mask, mask + width, -INFINITY);
            for (int64_t i = 0; i < n_seen[tile]; i++) {
                const int64_t start = blocks[i] * BLOCK;
                widen(halves(op->src[3], first + row, 0) + start, std::min(BLOCK, k->ne[1] - start), mask + i * BLOCK);
            }
            sums[row] = exponentials(scores + row * width, mask, width);
        }
        for (int64_t i = 0; i < n_seen[tile]; i++) {
            const float * block = &values[offset + blocks[i] * BLOCK * d];
            for (int64_t row = 0; row < n; row += STEP_ROWS) {
                for (int64_t column = 0; column < d; column += STEP_COLUMNS) {
                    multiply_add(scores + row * width + i * BLOCK, width, block + column, d, BLOCK, out + row * d + column, d);
                }
            }
        }
        for (int64_t row = 0; row < n; row++) {
            float * place = (float *) op->data + ((first + row) * q->ne[2] + head) * d;
            scale_row(out + row * d, d, sums[row] == 0.0f ? 0.0f : 1.0f / sums[row], place);
        }
    }

    int64_t n_blocks = 0;
    std::vector<float> keys, values;  // [kv head, block, d, BLOCK] and [kv head, block, BLOCK, d]
    std::vector<int32_t> seen;        // [tile, block]: the blocks that a token of the tile may see come first
    std::vector<int64_t> n_seen;      // of each tile
    std::vector<float> scratch;       // of each thread
};

// -- which operations are taken ---------------------------------------------------------------------------------------

bool is_plain_matrix(const ggml_tensor * tensor) {
    return ggml_is_contiguous(tensor) && tensor->ne[2] == 1 && tensor->ne[3] == 1;
}

// A layer's matrix. The head's few rows, and the vocabulary, stay with the CPU backend.
bool is_layer_matrix(const ggml_tensor * tensor) {
    const bool can_be_read =
        tensor->type == GGML_TYPE_F32 || ggml_get_type_traits(tensor->type)->to_float != nullptr;
    return std::strncmp(tensor->name, "blk.", 4) == 0 && is_plain_matrix(tensor) && can_be_read &&
           tensor->ne[1] <= LARGEST_OUTPUT;
}

bool takes_product(const ggml_tensor * op) {
    return op->op == GGML_OP_MUL_MAT && is_layer_matrix(op->src[0]) && is_plain_matrix(op->src[1]) &&
           op->src[1]->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32 && is_plain_matrix(op);
}

bool takes_bias(const ggml_tensor * op) {
    const ggml_tensor * bias = op->src[1];
    return op->op == GGML_OP_ADD && takes_product(op->src[0]) && bias->type == GGML_TYPE_F32 &&
           ggml_is_contiguous(bias) && ggml_nelements(bias) == op->ne[0];
}

bool takes_gelu(const ggml_tensor * op) {
    return op->op == GGML_OP_UNARY && ggml_get_unary_op(op) == GGML_UNARY_OP_GELU && takes_bias(op->src[0]);
}

bool takes_geglu(const ggml_tensor * op) {
    return op->op == GGML_OP_GLU && ggml_get_glu_op(op) == GGML_GLU_OP_GEGLU && op->src[1] != nullptr &&
           takes_product(op->src[0]) && is_plain_matrix(op->src[1]) && op->src[1]->type == GGML_TYPE_F32;
}

// Softmax attention over half-precision keys and values, without sinks, ALiBi or soft-capping.
bool takes_attention(const ggml_tensor * op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    float parameters[3];  // scale, largest ALiBi bias, soft cap
    std::memcpy(parameters, op->op_params, sizeof parameters);
    return op->op == GGML_OP_FLASH_ATTN_EXT && mask && !op->src[4] && parameters[1] == 0.0f && parameters[2] == 0.0f &&
           q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16 &&
           mask->type == GGML_TYPE_F16 && q->ne[3] == 1 && mask->ne[2] == 1 && mask->ne[3] == 1 &&
           q->nb[0] == sizeof(float) && k->nb[0] == sizeof(uint16_t) && v->nb[0] == sizeof(uint16_t) &&
           k->ne[0] == q->ne[0] && v->ne[0] == q->ne[0] && q->ne[0] % STEP_COLUMNS == 0 && q->ne[2] % k->ne[2] == 0;
}

// -- the backend ------------------------------------------------------------------------------------------------------

const float * floats(const ggml_tensor * tensor) { return (const float *) tensor->data; }

// An epilogue without its product: only when a caller stops after every node.
void apply_alone(const ggml_tensor * node) {
    const int64_t n = node->ne[0], rows = ggml_nelements(node) / n;
    const float *left = floats(node->src[0]), *right = node->src[1] ? floats(node->src[1]) : nullptr;
    float * out = (float *) node->data;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows * n; i++) {
        out[i] = node->op == GGML_OP_ADD     ? left[i] + right[i % n]
                 : node->op == GGML_OP_UNARY ? gelu(left[i])
                                             : gelu(left[i]) * right[i];
    }
}

// The product at `index` together with what follows it at once. Returns the number of nodes that were computed.
int multiply(Products & products, ggml_cgraph * graph, int index) {
    ggml_tensor * node = graph->nodes[index];
    const ggml_tensor * product = node;
    const float * extra = nullptr;
    Epilogue epilogue = PLAIN;
    int taken = 1;
    const auto next = [&]() -> ggml_tensor * {
        const int last = index + taken - 1;
        const bool is_only_input = last + 1 < graph->n_nodes && ggml_node_has_n_uses(graph, last, 1);
        return is_only_input && graph->nodes[last + 1]->src[0] == graph->nodes[last] ? graph->nodes[last + 1] : nullptr;
    };
    if (ggml_tensor * following = next()) {
        if (takes_bias(following)) {
            node = following, extra = floats(following->src[1]), epilogue = BIAS, taken++;
            following = next();
            if (following && takes_gelu(following)) {
                node = following, epilogue = BIAS_GELU, taken++;
            }
        } else if (takes_geglu(following)) {
            node = following, extra = floats(following->src[1]), epilogue = GEGLU, taken++;
        }
    }
    products.multiply(
        product->src[0], floats(product->src[1]), product->ne[1], extra, epilogue, (float *) node->data
    );
    return taken;
}

struct Context {
    Products products;
    Attention attention;
};

enum ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) {
    auto & [products, attention] = *(Context *) backend->context;
    products.forget_activations();
    try {
        for (int index = 0; index < graph->n_nodes;) {
            ggml_tensor * node = graph->nodes[index];
            const bool is_needed = (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0;
            if (is_needed && node->op == GGML_OP_MUL_MAT) {
                index += multiply(products, graph, index);
                products.forget_activations_in(graph->nodes[index - 1]);
                continue;
            }
            if (is_needed && node->op == GGML_OP_FLASH_ATTN_EXT) {
                attention.compute(node, products.n_threads);
            }
            if (is_needed && (node->op == GGML_OP_ADD || node->op == GGML_OP_UNARY || node->op == GGML_OP_GLU)) {
                apply_alone(node);
            }
            if (is_needed) {
                products.forget_activations_in(node);
            }
            index++;
        }
    } catch (const std::bad_alloc &) {
        return GGML_STATUS_ALLOC_FAILED;
    } catch (const std::exception & error) {
        GGML_LOG_ERROR("%s: %s\n", __func__, error.what());
        return GGML_STATUS_FAILED;
    }
    return GGML_STATUS_SUCCESS;
}

const char * name_of_backend(ggml_backend_t) { return "int8"; }

void free_backend(ggml_backend_t backend) {
    delete (Context *) backend->context;
    delete backend;
}

void set_n_threads(ggml_backend_t backend, int n_threads) { ((Context *) backend->context)->products.n_threads = n_threads; }

ggml_guid_t guid() {
    static ggml_guid value = {0x5e, 0x1d, 0x0c, 0x38, 0x77, 0x42, 0x4b, 0x91, 0x8a, 0x60, 0x3f, 0x0e, 0xd4, 0x29, 0xb7, 0x15};
    return &value;
}

ggml_backend_dev_t device(bool takes_anything);

ggml_backend_t make_backend(ggml_backend_dev_t, const char *) {
    ggml_backend_i functions{};
    functions.get_name = name_of_backend;
    functions.free = free_backend;
    functions.graph_compute = compute;
    return new ggml_backend{guid(), functions, device(options.is_used), new Context()};
}

// -- the device and its registration ----------------------------------------------------------------------------------

const char * device_name(ggml_backend_dev_t) { return "int8"; }
const char * device_description(ggml_backend_dev_t) { return "int8 matrix products by oneDNN"; }
void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = 0; }
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; }

void device_properties(ggml_backend_dev_t device, ggml_backend_dev_props * properties) {
    properties->name = device_name(device);
    properties->description = device_description(device);
    properties->type = device_type(device);
    properties->memory_free = properties->memory_total = 0;
    properties->caps.buffer_from_host_ptr = true;
    properties->caps.mmap_support = true;
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t) { return ggml_backend_cpu_buffer_type(); }

ggml_backend_buffer_t device_buffer(ggml_backend_dev_t, void * address, size_t size, size_t) {
    return ggml_backend_cpu_buffer_from_ptr(address, size);
}

bool device_takes(ggml_backend_dev_t own, const ggml_tensor * op) {
    if (own->context == nullptr) {
        return false;
    }
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return true;
        case GGML_OP_MUL_MAT:
            return takes_product(op);
        case GGML_OP_ADD:
            return takes_bias(op);
        case GGML_OP_UNARY:
            return takes_gelu(op);
        case GGML_OP_GLU:
            return takes_geglu(op);
        case GGML_OP_FLASH_ATTN_EXT:
            return takes_attention(op);
        default:
            return false;
    }
}

bool device_reads(ggml_backend_dev_t, ggml_backend_buffer_type_t type) { return ggml_backend_buft_is_host(type); }

ggml_backend_reg_t registration();

// llama.cpp makes a backend of every ACCEL device for every context; one that is not to be used says that it takes nothing.
ggml_backend_dev_t device(bool takes_anything) {
    static ggml_backend_device devices[2] = {};
    static const bool made = [] {
        for (ggml_backend_device & one : devices) {
            one.iface.get_name = device_name;
            one.iface.get_description = device_description;
            one.iface.get_memory = device_memory;
            one.iface.get_type = device_type;
            one.iface.get_props = device_properties;
            one.iface.init_backend = make_backend;
            one.iface.get_buffer_type = device_buffer_type;
            one.iface.buffer_from_host_ptr = device_buffer;
            one.iface.supports_op = device_takes;
            one.iface.supports_buft = device_reads;
            one.reg = registration();
        }
        devices[1].context = devices;  // anything
        return true;
    }();
    (void) made;
    return &devices[takes_anything];
}

const char * registration_name(ggml_backend_reg_t) { return "int8"; }
size_t device_count(ggml_backend_reg_t) { return 1; }
ggml_backend_dev_t device_at(ggml_backend_reg_t, size_t) { return device(true); }

void * function_named(ggml_backend_reg_t, const char * name) {
    return std::strcmp(name, "ggml_backend_set_n_threads") == 0 ? (void *) set_n_threads : nullptr;
}

ggml_backend_reg_t registration() {
    static ggml_backend_reg value{
        GGML_BACKEND_API_VERSION, {registration_name, device_count, device_at, function_named}, nullptr
    };
    return &value;
}

}  // namespace

// -- what the server calls --------------------------------------------------------------------------------------------

EXPORT ggml_backend_reg_t ggml_backend_init() { return registration(); }

// The llama-cpp-python whose headers this was compiled with: structures differ from version to version.
EXPORT const char * rerank_accel_built_for() { return RERANK_ACCEL_BUILT_FOR; }

// Whether this CPU multiplies int8 fast; without such instructions oneDNN is slower than ggml.
EXPORT bool rerank_accel_is_fast_here() {
    switch (dnnl::get_effective_cpu_isa()) {
        case dnnl::cpu_isa::avx2_vnni:
        case dnnl::cpu_isa::avx2_vnni_2:
        case dnnl::cpu_isa::avx512_core_vnni:
        case dnnl::cpu_isa::avx512_core_bf16:
        case dnnl::cpu_isa::avx512_core_fp16:
        case dnnl::cpu_isa::avx512_core_amx:
        case dnnl::cpu_isa::avx512_core_amx_fp16:
            return true;
        default:
            return false;
    }
}

EXPORT size_t rerank_accel_copied_bytes() { return copied_bytes; }

// For the contexts that this thread makes from now on. use: whether they multiply here at all. strict: activations in two
// int8 parts, nearly as exact as float32, for two products in place of one. give_back_pages: of the mapped file.
EXPORT void rerank_accel_configure(bool use, bool strict, bool give_back_pages) {
    options = {use, strict, give_back_pages};
}

// For tests: out [rows, n] = in [rows, k] x weights [n, k] of a ggml type. Returns false when oneDNN refuses.
EXPORT bool rerank_accel_multiply(
    int type, const void * weights, int64_t n, int64_t k, const float * in, int64_t rows, const float * bias, bool gelu,
    int n_threads, float * out
) {
    try {
        ggml_tensor matrix{};
        matrix.type = (ggml_type) type;
        matrix.ne[0] = k, matrix.ne[1] = n, matrix.ne[2] = matrix.ne[3] = 1;
        matrix.nb[0] = ggml_type_size(matrix.type), matrix.nb[1] = ggml_row_size(matrix.type, k);
        matrix.nb[2] = matrix.nb[3] = matrix.nb[1] * n;
        matrix.data = const_cast<void *>(weights);
        Products products;
        products.n_threads = n_threads;
        products.multiply(&matrix, in, rows, bias, !bias ? PLAIN : gelu ? BIAS_GELU : BIAS, out);
        return true;
    } catch (const std::exception & error) {
        GGML_LOG_ERROR("%s: %s\n", __func__, error.what());
        return false;
    }
}
