// The products of a layer's matrices with a batch's activations, in int8 or bfloat16.
//
// int8: weights become int8 once, with a scale per output; activations become int8 with a scale per token. The product is
// exact in int32. bfloat16: both are rounded to 8 bits of mantissa, and sums are float32. Scales, bias, GELU and residual
// are applied while a block of the product is in the cache.

#pragma once

#include "kernels.h"

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <oneapi/dnnl/dnnl.hpp>
#include <omp.h>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <vector>

namespace {

constexpr int64_t BLOCK_ROWS = 256;         // more are multiplied block by block
constexpr int64_t ROW_STEP = 32;            // the rows of a oneDNN kernel: one for each number would take long to make
constexpr int64_t BLOCK_BYTES = 512 << 10;  // of oneDNN's weights: half of a second-level cache

std::atomic<size_t> copied_bytes{0};

// What the contexts that this thread makes from now on do.
struct Options {
    bool is_used = false;
    bool is_bf16 = false;
    bool gives_back_pages = false;  // of the mapped file, once their matrix is copied
};
thread_local Options options;

bool has_isa(dnnl::cpu_isa wanted) {
    static const auto known = (uint32_t) dnnl::get_effective_cpu_isa();  // a mask of what is there
    return ((uint32_t) wanted & known) == (uint32_t) wanted;
}
// Intel's tiles are faster still, and oneDNN uses them.
bool has_tiles() { return has_isa(dnnl::cpu_isa::avx512_core_amx); }
bool has_own_int8() { return has_isa(dnnl::cpu_isa::avx512_core_vnni) && !has_tiles(); }
bool has_bf16() { return has_isa(dnnl::cpu_isa::avx512_core_bf16); }
bool has_own_bf16() { return has_bf16() && !has_tiles(); }

// -- what follows a product -------------------------------------------------------------------------------------------

// out = residual + activation(product + bias). Each pointer may be null. GEGLU: gelu(product) x factor.
struct Epilogue {
    const float * bias = nullptr;      // [n]
    const float * factor = nullptr;    // [rows, n]
    const float * residual = nullptr;  // [rows, n]
    bool has_gelu = false;
};

// A part of one row, n columns from `place` of the output on. product and out may be the same memory.
template <typename Product>
INLINE void finish_row_of(
    const Product * product, int64_t n, float row_scale, const float * column_scales, const Epilogue & epilogue,
    int64_t first_column, int64_t place, float * out
) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = (float) product[i] * (row_scale * column_scales[i]);
    if (const float * bias = epilogue.bias) {
        bias += first_column;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] += bias[i];
    }
    if (epilogue.has_gelu) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] = gelu(out[i]);
    }
    if (const float * factor = epilogue.factor) {
        factor += place;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] *= factor[i];
    }
    if (const float * residual = epilogue.residual) {
        residual += place;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] += residual[i];
    }
}

VECTORISED void finish_row(
    const int32_t * product, int64_t n, float row_scale, const float * column_scales, const Epilogue & epilogue,
    int64_t first_column, int64_t place, float * out
) {
    finish_row_of(product, n, row_scale, column_scales, epilogue, first_column, place, out);
}

VECTORISED void finish_row(
    const float * product, int64_t n, float row_scale, const float * column_scales, const Epilogue & epilogue,
    int64_t first_column, int64_t place, float * out
) {
    finish_row_of(product, n, row_scale, column_scales, epilogue, first_column, place, out);
}

// A tile of whole panels: rows of 64 columns.
template <typename Product>
WITH_AVX512 void finish_tile(
    const Product * product, int64_t rows, const float * row_scales, const float * column_scales,
    const Epilogue & epilogue, int64_t first_column, int64_t place, int64_t n, float * out
) {
    for (int64_t row = 0; row < rows; row++, product += PANEL, place += n) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < PANEL; j += LANES) {
            __m512 values;
            if constexpr (std::is_same<Product, int32_t>::value) {
                values = _mm512_cvtepi32_ps(_mm512_loadu_si512(product + j));
            } else {
                values = _mm512_loadu_ps(product + j);
            }
            const __m512 scales = _mm512_mul_ps(_mm512_set1_ps(row_scales[row]), _mm512_loadu_ps(column_scales + j));
            values = _mm512_mul_ps(values, scales);
            if (epilogue.bias) {
                values = _mm512_add_ps(values, _mm512_loadu_ps(epilogue.bias + first_column + j));
            }
            if (epilogue.has_gelu) {
                values = gelus(values);
            }
            if (epilogue.factor) {
                values = _mm512_mul_ps(values, _mm512_loadu_ps(epilogue.factor + place + j));
            }
            if (epilogue.residual) {
                values = _mm512_add_ps(values, _mm512_loadu_ps(epilogue.residual + place + j));
            }
            _mm512_storeu_ps(out + place + j, values);
        }
    }
}

// -- weights and activations ------------------------------------------------------------------------------------------

// Memory that begins at a cache line.
class Buffer {
  public:
    explicit Buffer(size_t n_bytes) : n_bytes(n_bytes), memory(n_bytes + CACHE_LINE) {}
    char * data() { return (char *) (((uintptr_t) memory.data() + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE); }
    const size_t n_bytes;

  private:
    static constexpr size_t CACHE_LINE = 64;
    std::vector<char> memory;
};

// The rows of activations that are multiplied next.
struct Activations {
    const float * source = nullptr;  // what they were made of
    int64_t rows = 0, k = 0;
    std::vector<char> values;        // [rows, k] of int8 or bfloat16
    std::vector<float> scales;       // of each row; for bfloat16 1, or NaN where a value is not finite
    std::vector<int32_t> sums;       // of each row's int8

    const char * row(int64_t index, int64_t value_bytes) const { return values.data() + index * k * value_bytes; }
};

// A weight matrix [k, n] in blocks of columns, in the layout that the kernels want, and the scale of each output.
struct Weights {
    int64_t columns = 0;               // in a block
    std::unique_ptr<Buffer> panels;    // ours
    std::vector<dnnl::memory> blocks;  // or oneDNN's
    std::vector<float> scales;
    size_t counted_bytes = 0;

    void count() {
        counted_bytes = panels ? panels->n_bytes : 0;
        for (const auto & block : blocks) counted_bytes += block.get_desc().get_size();
        copied_bytes += counted_bytes;
    }
    ~Weights() { copied_bytes -= counted_bytes; }
};

// -- products ---------------------------------------------------------------------------------------------------------

// A product is cut into blocks of rows and columns whose operands fit a core's second-level cache. Each thread multiplies
// one block and finishes it while it is still there; oneDNN itself uses no threads.
class Products {
  public:
    Products() : engine(dnnl::engine::kind::cpu, 0), stream(engine) {}

    int n_threads = 1;

    // out [rows, n] = epilogue(in [rows, k] x weights)
    void multiply(
        const ggml_tensor * matrix, const float * in, int64_t rows, const Epilogue & epilogue, float * out
    ) {
        if (rows == 0) {
            return;
        }
        const Weights & weights = weights_of(matrix);
        convert(in, rows, matrix->ne[0]);
        if (weights.panels) {
            multiply_panels(weights, matrix->ne[1], epilogue, out);
        } else {
            multiply_blocks(weights, matrix->ne[1], epilogue, out);
        }
    }

    // Activations that were converted last are used again by the products that read the same tensor (query, key, value),
    // until a new graph or the result of a node may hold other values at the same place.
    void forget_activations() { activations.source = nullptr; }
    void forget_activations_in(const ggml_tensor * written) {
        const char *first = (const char *) written->data, *start = (const char *) activations.source;
        const char * end = start + activations.rows * activations.k * sizeof(float);
        if (first < end && start < first + ggml_nbytes(written)) {
            forget_activations();
        }
    }

    // Rows that are written now and multiplied next: convert_row may be called for each as soon as it is there.
    void expect(const float * source, int64_t rows, int64_t k) {
        const int64_t padded = rounded_up(rows);  // what follows the last row is multiplied too, and ignored
        activations.values.resize(std::max(activations.values.size(), (size_t) (padded * k * value_bytes)));
        activations.scales.resize(std::max(activations.scales.size(), (size_t) padded));
        activations.sums.resize(std::max(activations.sums.size(), (size_t) padded));
        activations.source = source, activations.rows = rows, activations.k = k;
    }
    void convert_row(const float * values, int64_t row) {
        convert_values(values, activations.k, activations.values.data() + row * activations.k * value_bytes,
                       &activations.scales[row], &activations.sums[row]);
    }

  private:
    using dt = dnnl::memory::data_type;
    using tag = dnnl::memory::format_tag;
    using Shape = std::tuple<int64_t, int64_t, int64_t>;  // rows, k, columns

    static int64_t rounded_up(int64_t rows) { return ((rows + ROW_STEP - 1) / ROW_STEP + 1) * ROW_STEP; }

    void convert_values(const float * values, int64_t n, char * out, float * scale, int32_t * sum) const {
        if (is_bf16) {
            *scale = 1.0f + narrow(values, n, 1.0f, (uint16_t *) (void *) out);
        } else {
            const bool is_wide = is_own && n % LANES == 0;
            *scale = is_wide ? wide_scale_of(values, n) : scale_of(values, n);
            *sum = (is_wide ? wide_quantise : quantise)(values, n, *scale, (int8_t *) out);
        }
    }

    void convert(const float * in, int64_t rows, int64_t k) {
        if (in == activations.source && rows == activations.rows && k == activations.k) {
            return;
        }
        expect(in, rows, k);
#pragma omp parallel for schedule(static) num_threads(n_threads)
        for (int64_t row = 0; row < rows; row++) convert_row(in + row * k, row);
    }

    // -- with our kernels

    void multiply_panels(const Weights & weights, int64_t n, const Epilogue & epilogue, float * out) {
        const int64_t rows = activations.rows, k = activations.k, panel_bytes = k * PANEL * value_bytes;
        const int64_t n_panels = (n + PANEL - 1) / PANEL, n_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
        // enough blocks for all threads, but not so small that a panel is read for a few rows only
        const int64_t wanted = std::max((rows + BLOCK_ROWS - 1) / BLOCK_ROWS, 4 * n_threads / n_panels);
        const int64_t block_tiles = (n_tiles + wanted - 1) / wanted, n_blocks = (n_tiles + block_tiles - 1) / block_tiles;
#pragma omp parallel for schedule(dynamic) num_threads(n_threads)
        for (int64_t item = 0; item < n_panels * n_blocks; item++) {
            alignas(64) float product[TILE_ROWS * PANEL];
            const int64_t panel = item / n_blocks, first_tile = item % n_blocks * block_tiles;
            for (int64_t tile = first_tile; tile < std::min(n_tiles, first_tile + block_tiles); tile++) {
                const int64_t row = tile * TILE_ROWS;
                multiply_tile(row, weights.panels->data() + panel * panel_bytes, product);
                finish_panel(weights, n, row, std::min(TILE_ROWS, rows - row), panel * PANEL, product, epilogue, out);
            }
        }
    }

    void multiply_tile(int64_t row, const char * panel, float * product) const {
        const int64_t k = activations.k;
        const char * in = activations.row(row, value_bytes);
        if (is_bf16) {
            const Parts parts{(const uint16_t *) (const void *) panel, 1, k / 2, 0, 2 * LANES, 2 * PANEL};
            multiply_bf16<4>((const uint16_t *) (const void *) in, k, parts, product, PANEL);
        } else {
            multiply_int8((const int8_t *) in, k, (const uint8_t *) panel, &activations.sums[row],
                          (int32_t *) (void *) product);
        }
    }

    void finish_panel(
        const Weights & weights, int64_t n, int64_t row, int64_t rows, int64_t column, const float * product,
        const Epilogue & epilogue, float * out
    ) const {
        if (n - column < PANEL) {
            finish(weights, n, row, rows, column, n - column, PANEL, product, epilogue, out);
        } else if (is_bf16) {
            finish_tile(product, rows, &activations.scales[row], &weights.scales[column], epilogue, column,
                        row * n + column, n, out);
        } else {
            finish_tile((const int32_t *) (const void *) product, rows, &activations.scales[row], &weights.scales[column],
                        epilogue, column, row * n + column, n, out);
        }
    }

    // -- with oneDNN's

    void multiply_blocks(const Weights & weights, int64_t n, const Epilogue & epilogue, float * out) {
        const int64_t rows = activations.rows, k = activations.k, block_size = BLOCK_ROWS * weights.columns;
        const int64_t n_column_blocks = weights.blocks.size(), n_row_blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
        products.resize(std::max(products.size(), (size_t) (n_threads * block_size)));
        std::atomic<bool> failed{false};
#pragma omp parallel for schedule(dynamic) num_threads(n_threads)
        for (int64_t block = 0; block < n_row_blocks * n_column_blocks; block++) {
            const int64_t first_row = block / n_column_blocks * BLOCK_ROWS, column_block = block % n_column_blocks;
            const int64_t first_column = column_block * weights.columns;
            const int64_t block_rows = std::min(BLOCK_ROWS, rows - first_row);
            const int64_t block_columns = std::min(weights.columns, n - first_column);
            float * own = products.data() + omp_get_thread_num() * block_size;
            try {
                execute(activations.row(first_row, value_bytes), weights.blocks[column_block], block_rows, k,
                        block_columns, own);
            } catch (const std::exception &) {
                failed = true;
                continue;
            }
            finish(weights, n, first_row, block_rows, first_column, block_columns, block_columns, own, epilogue, out);
        }
        if (failed) {
            throw std::runtime_error("oneDNN could not multiply");
        }
    }

    // product [rows, columns], its rows `distance` apart: floats, or the int32 of the int8 products.
    void finish(
        const Weights & weights, int64_t n, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns,
        int64_t distance, const float * product, const Epilogue & epilogue, float * out
    ) const {
        for (int64_t row = 0; row < rows; row++) {
            const int64_t place = (first_row + row) * n + first_column;
            const float * own = product + row * distance;
            if (is_bf16) {
                finish_row(own, columns, activations.scales[first_row + row], &weights.scales[first_column], epilogue,
                           first_column, place, out + place);
            } else {
                finish_row((const int32_t *) (const void *) own, columns, activations.scales[first_row + row],
                           &weights.scales[first_column], epilogue, first_column, place, out + place);
            }
        }
    }

    dnnl::matmul::primitive_desc describe(
        int64_t rows, int64_t k, int64_t columns, const dnnl::memory::desc & weights
    ) const {
        dnnl::primitive_attr attributes;
        attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);  // the library's own is not for several threads
        return {engine, {{rows, k}, type, tag::ab}, weights, {{rows, columns}, product_type, tag::ab}, attributes};
    }

    // The layout that the kernel for a whole block of rows wants; those for fewer are made to take the same.
    dnnl::memory::desc layout_of(int64_t k, int64_t columns) const {
        return describe(BLOCK_ROWS, k, columns, {{k, columns}, type, tag::any}).weights_desc();
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
        const char * in, const dnnl::memory & weights, int64_t rows, int64_t k, int64_t columns, float * out
    ) {
        thread_local std::vector<char> scratchpad;
        scratchpad.resize(std::max(scratchpad.size(), scratchpad_bytes + 64));
        void * aligned = (void *) (((uintptr_t) scratchpad.data() + 63) / 64 * 64);
        dnnl::stream own(engine);
        rows = (rows + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
        kernels.at({rows, k, columns}).execute(own, {
            {DNNL_ARG_SRC, {{{rows, k}, type, tag::ab}, engine, const_cast<char *>(in)}},
            {DNNL_ARG_WEIGHTS, weights},
            {DNNL_ARG_DST, {{{rows, columns}, product_type, tag::ab}, engine, out}},
            {DNNL_ARG_SCRATCHPAD, {{{(int64_t) scratchpad_bytes}, dt::u8, tag::a}, engine, aligned}},
        });
        own.wait();
    }

    // -- weights

    const Weights & weights_of(const ggml_tensor * tensor) {
        auto & known = prepared[tensor->data];
        if (!known) {
            known = prepare(tensor);
        }
        return *known;
    }

    std::unique_ptr<Weights> prepare(const ggml_tensor * tensor) {
        const int64_t k = tensor->ne[0], n = tensor->ne[1];
        auto made = std::make_unique<Weights>();
        std::vector<char> rows = converted_rows(tensor, *made);
        if (is_own) {
            made->columns = PANEL;
            pack(rows, k, n, *made);
        } else {
            reorder(rows, k, n, *made);
        }
        made->count();
        drop_pages(tensor);
        return made;
    }

    // [n, k] of int8 or bfloat16
    std::vector<char> converted_rows(const ggml_tensor * tensor, Weights & made) const {
        const int64_t k = tensor->ne[0], n = tensor->ne[1];
        const auto to_float = ggml_get_type_traits(tensor->type)->to_float;  // none for F32
        std::vector<char> rows(n * k * value_bytes);
        std::vector<float> scratch(to_float ? n_threads * k : 0);
        made.scales.resize(n);
#pragma omp parallel for schedule(static) num_threads(n_threads)
        for (int64_t row = 0; row < n; row++) {
            const void * source = (const char *) tensor->data + row * tensor->nb[1];
            const float * wide = (const float *) source;
            if (to_float) {
                float * own = scratch.data() + omp_get_thread_num() * k;
                to_float(source, own, k);
                wide = own;
            }
            int32_t sum;
            convert_values(wide, k, &rows[row * k * value_bytes], &made.scales[row], &sum);
        }
        return rows;
    }

    // Panels of 64 columns, [k x value_bytes / 4][64] of 4 bytes; zeroes after the last column.
    void pack(const std::vector<char> & rows, int64_t k, int64_t n, Weights & made) const {
        const int64_t n_panels = (n + PANEL - 1) / PANEL, n_words = k * value_bytes / 4;
        const uint32_t offset = is_bf16 ? 0 : 0x80808080u;  // 128 more for each int8
        made.panels = std::make_unique<Buffer>(n_panels * PANEL * n_words * 4);
        const uint32_t * words = (const uint32_t *) (const void *) rows.data();
        uint32_t * panels = (uint32_t *) (void *) made.panels->data();
#pragma omp parallel for schedule(static) num_threads(n_threads)
        for (int64_t column = 0; column < n; column++) {
            uint32_t * out = panels + column / PANEL * PANEL * n_words + column % PANEL;
            for (int64_t i = 0; i < n_words; i++) out[i * PANEL] = words[column * n_words + i] ^ offset;
        }
    }

    void reorder(std::vector<char> & rows, int64_t k, int64_t n, Weights & made) {
        // as many columns as half the cache holds, but something to do for every thread
        const int64_t fitting = BLOCK_BYTES / (k * value_bytes), share = (n + n_threads - 1) / n_threads;
        made.columns = std::max<int64_t>(64, (std::min(fitting, share) + 63) / 64 * 64);
        for (int64_t first = 0; first < n; first += made.columns) {
            const int64_t columns = std::min(made.columns, n - first);
            make_kernels(k, columns);
            dnnl::memory plain({{k, columns}, type, tag::ba}, engine, rows.data() + first * k * value_bytes);
            made.blocks.emplace_back(layout_of(k, columns), engine);
            dnnl::reorder(plain, made.blocks.back()).execute(stream, plain, made.blocks.back());
            stream.wait();
        }
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

    const bool is_bf16 = options.is_bf16 && has_bf16(), gives_back_pages = options.gives_back_pages;
    const bool is_own = is_bf16 ? has_own_bf16() : has_own_int8();
    const int64_t value_bytes = is_bf16 ? 2 : 1;
    const dt type = is_bf16 ? dt::bf16 : dt::s8, product_type = is_bf16 ? dt::f32 : dt::s32;
    dnnl::engine engine;
    dnnl::stream stream;
    std::unordered_map<const void *, std::unique_ptr<Weights>> prepared;  // by the address of the mapped matrix
    std::map<Shape, dnnl::matmul> kernels;
    size_t scratchpad_bytes = 0;
    Activations activations;
    std::vector<float> products;  // of each thread: those of a block
};

}  // namespace
