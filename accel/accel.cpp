// An engine for llama.cpp on x86 CPUs: a ggml backend of device type ACCEL that takes over the matrix products of the
// layers in int8 or bfloat16, what follows them at once (bias, GELU, GEGLU, residual), normalisation, and attention.
// llama.cpp offers every operation to it before the CPU backend; what it does not take stays there.
//
// ggml-backend-impl.h (llama-cpp-python's source distribution) says what each function of the interface must do.

#include "attention.h"
#include "products.h"

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-impl.h"
#include "ggml.h"

#include <exception>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t LARGEST_OUTPUT = 65536;  // a vocabulary's matrix is used for a few rows: it is not worth its copy

// -- which operations are taken ---------------------------------------------------------------------------------------

bool is_plain_matrix(const ggml_tensor * tensor) {
    return ggml_is_contiguous(tensor) && tensor->ne[2] == 1 && tensor->ne[3] == 1;
}

// A layer's matrix. The head's few rows, and the vocabulary, stay with the CPU backend.
bool is_layer_matrix(const ggml_tensor * tensor) {
    const bool can_be_read =
        tensor->type == GGML_TYPE_F32 || ggml_get_type_traits(tensor->type)->to_float != nullptr;
    return std::strncmp(tensor->name, "blk.", 4) == 0 && is_plain_matrix(tensor) && can_be_read &&
           tensor->ne[0] % 4 == 0 && tensor->ne[1] <= LARGEST_OUTPUT;
}

bool takes_product(const ggml_tensor * op) {
    return op->op == GGML_OP_MUL_MAT && is_layer_matrix(op->src[0]) && is_plain_matrix(op->src[1]) &&
           op->src[1]->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32 && is_plain_matrix(op);
}

bool is_vector_for(const ggml_tensor * vector, const ggml_tensor * rows) {
    return vector->type == GGML_TYPE_F32 && ggml_is_contiguous(vector) && ggml_nelements(vector) == rows->ne[0];
}

bool takes_bias(const ggml_tensor * op) {
    return op->op == GGML_OP_ADD && takes_product(op->src[0]) && is_vector_for(op->src[1], op);
}

bool takes_gelu(const ggml_tensor * op) {
    return op->op == GGML_OP_UNARY && ggml_get_unary_op(op) == GGML_UNARY_OP_GELU && takes_bias(op->src[0]);
}

bool takes_geglu(const ggml_tensor * op) {
    return op->op == GGML_OP_GLU && ggml_get_glu_op(op) == GGML_GLU_OP_GEGLU && op->src[1] != nullptr &&
           takes_product(op->src[0]) && is_plain_matrix(op->src[1]) && op->src[1]->type == GGML_TYPE_F32;
}

// What goes around a layer is added to its product.
bool takes_residual(const ggml_tensor * op) {
    return op->op == GGML_OP_ADD && (takes_product(op->src[0]) || takes_bias(op->src[0])) &&
           op->src[1]->type == GGML_TYPE_F32 && is_plain_matrix(op->src[1]) && ggml_are_same_shape(op->src[0], op->src[1]);
}

bool takes_norm(const ggml_tensor * op) {
    return (op->op == GGML_OP_NORM || op->op == GGML_OP_RMS_NORM) && op->src[0]->type == GGML_TYPE_F32 &&
           is_plain_matrix(op->src[0]) && is_plain_matrix(op);
}

bool takes_norm_weight(const ggml_tensor * op) {
    return op->op == GGML_OP_MUL && takes_norm(op->src[0]) && is_vector_for(op->src[1], op);
}

bool takes_norm_bias(const ggml_tensor * op) {
    return op->op == GGML_OP_ADD && takes_norm_weight(op->src[0]) && is_vector_for(op->src[1], op);
}

// Softmax attention over half-precision keys and values, without sinks, ALiBi or soft-capping.
bool takes_attention(const ggml_tensor * op) {
    if (op->op != GGML_OP_FLASH_ATTN_EXT) {
        return false;
    }
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    float parameters[3];  // scale, largest ALiBi bias, soft cap
    std::memcpy(parameters, op->op_params, sizeof parameters);
    return mask && !op->src[4] && parameters[1] == 0.0f && parameters[2] == 0.0f && q->type == GGML_TYPE_F32 &&
           k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16 && mask->type == GGML_TYPE_F16 && q->ne[3] == 1 &&
           mask->ne[2] == 1 && mask->ne[3] == 1 && q->nb[0] == sizeof(float) && k->nb[0] == sizeof(uint16_t) &&
           v->nb[0] == sizeof(uint16_t) && k->ne[0] == q->ne[0] && v->ne[0] == q->ne[0] &&
           q->ne[0] % STEP_COLUMNS == 0 && q->ne[2] % k->ne[2] == 0;
}

// Keys or values of an encoder, which llama.cpp makes half-precision for its attention.
bool takes_copy(const ggml_tensor * op) {
    return op->op == GGML_OP_CPY && has_bf16() && op->src[0]->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F16 &&
           op->src[0]->nb[0] == sizeof(float) && op->src[1] == op && ggml_is_contiguous(op) && op->ne[3] == 1 &&
           ggml_are_same_shape(op, op->src[0]);
}

// -- the backend ------------------------------------------------------------------------------------------------------

const float * floats(const ggml_tensor * tensor) { return (const float *) tensor->data; }

// An epilogue without its product: only when a caller stops after every node.
void apply_alone(const ggml_tensor * node) {
    const float *left = floats(node->src[0]), *right = node->src[1] ? floats(node->src[1]) : nullptr;
    const int64_t n = ggml_nelements(node), n_right = right ? ggml_nelements(node->src[1]) : 1;
    float * out = (float *) node->data;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        out[i] = node->op == GGML_OP_ADD     ? left[i] + right[i % n_right]
                 : node->op == GGML_OP_MUL   ? left[i] * right[i % n_right]
                 : node->op == GGML_OP_UNARY ? gelu(left[i])
                                             : gelu(left[i]) * right[i];
    }
}

void copy_alone(const ggml_tensor * node) {
    const ggml_tensor * from = node->src[0];
    const int64_t n = from->ne[0], rows = from->ne[1], n_rows = ggml_nrows(from);
    ggml_fp16_t * out = (ggml_fp16_t *) node->data;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n_rows; i++) {
        const char * row = (const char *) from->data + i % rows * from->nb[1] + i / rows * from->nb[2];
        ggml_fp32_to_fp16_row((const float *) (const void *) row, out + i * n, n);
    }
}

// One graph, or the part of it that llama.cpp gives to this backend.
class Run {
  public:
    Run(Products & products, FloatAttention & float_attention, Bf16Attention & bf16_attention, ggml_cgraph * graph)
        : products(products), float_attention(float_attention), bf16_attention(bf16_attention), graph(graph) {}

    void compute() {
        products.forget_activations();
        bf16_attention.forget();
        for (int index = 0; index < graph->n_nodes;) {
            if (graph->nodes[index]->flags & GGML_TENSOR_FLAG_COMPUTE) {
                index += compute_at(index);
            } else {
                index++;
            }
        }
    }

  private:
    // Returns the number of nodes that were computed.
    int compute_at(int index) {
        const ggml_tensor * node = graph->nodes[index];
        switch (node->op) {
            case GGML_OP_MUL_MAT:
                return multiply(index);
            case GGML_OP_NORM:
            case GGML_OP_RMS_NORM:
                return normalise_rows(index);
            case GGML_OP_CPY:
                if (is_only_for_attention(index)) {
                    skipped.push_back(node);
                    return 1;
                }
                copy_alone(node);
                break;
            case GGML_OP_FLASH_ATTN_EXT:
                attend(node);
                break;
            case GGML_OP_ADD:
            case GGML_OP_MUL:
            case GGML_OP_UNARY:
            case GGML_OP_GLU:
                apply_alone(node);
                break;
            default:
                return 1;  // views
        }
        products.forget_activations_in(node);
        return 1;
    }

    // The node after the one at `last`, if it is all that reads its result.
    ggml_tensor * only_reader(int last) const {
        const bool is_only = last + 1 < graph->n_nodes && ggml_node_has_n_uses(graph, last, 1);
        ggml_tensor * following = is_only ? graph->nodes[last + 1] : nullptr;
        return following && following->src[0] == graph->nodes[last] ? following : nullptr;
    }

    // The product at `index` together with what follows it at once.
    int multiply(int index) {
        const ggml_tensor * product = graph->nodes[index];
        Epilogue epilogue;
        int last = index;
        ggml_tensor * following = only_reader(last);
        if (following && takes_bias(following)) {
            epilogue.bias = floats(following->src[1]);
            following = only_reader(++last);
        }
        if (following && takes_gelu(following)) {
            epilogue.has_gelu = true;
            last++;
        } else if (following && takes_geglu(following)) {
            epilogue.has_gelu = true;
            epilogue.factor = floats(following->src[1]);
            last++;
        } else if (following && takes_residual(following)) {
            epilogue.residual = floats(following->src[1]);
            last++;
        }
        const ggml_tensor * out = graph->nodes[last];
        products.multiply(product->src[0], floats(product->src[1]), product->ne[1], epilogue, (float *) out->data);
        products.forget_activations_in(out);
        return last - index + 1;
    }

    // A normalisation with its weight and bias; the rows are made ready for the product that follows while they are near.
    int normalise_rows(int index) {
        const ggml_tensor * in = graph->nodes[index]->src[0];
        const float *weight = nullptr, *bias = nullptr;
        int last = index;
        ggml_tensor * following = only_reader(last);
        if (following && takes_norm_weight(following)) {
            weight = floats(following->src[1]);
            following = only_reader(++last);
            if (following && takes_norm_bias(following)) {
                bias = floats(following->src[1]);
                last++;
            }
        }
        const bool subtracts_mean = graph->nodes[index]->op == GGML_OP_NORM;
        const int64_t n = in->ne[0], rows = in->ne[1];
        float epsilon, * out = (float *) graph->nodes[last]->data;
        std::memcpy(&epsilon, graph->nodes[index]->op_params, sizeof epsilon);
        products.expect(out, rows, n);
#pragma omp parallel for schedule(static) num_threads(products.n_threads)
        for (int64_t row = 0; row < rows; row++) {
            normalise(floats(in) + row * n, n, subtracts_mean, epsilon, weight, bias, out + row * n);
            products.convert_row(out + row * n, row);
        }
        return last - index + 1;
    }

    // Whether the copy at `index` is read by nothing but the attention that follows, before anything else is written: the
    // attention then reads what it is a copy of.
    bool is_only_for_attention(int index) const {
        const ggml_tensor * node = graph->nodes[index];
        for (int next = index; next < graph->n_nodes; next++) {
            const ggml_tensor * following = graph->nodes[next];
            if (following->op == GGML_OP_FLASH_ATTN_EXT) {
                return takes_attention(following) && (following->src[1] == node || following->src[2] == node);
            }
            // a cast is its own second source (ggml_cast), so it is used once more
            if (!is_view(following) && !(takes_copy(following) && ggml_node_has_n_uses(graph, next, 2))) {
                return false;
            }
        }
        return false;
    }

    static bool is_view(const ggml_tensor * node) {
        return node->op == GGML_OP_VIEW || node->op == GGML_OP_RESHAPE || node->op == GGML_OP_PERMUTE ||
               node->op == GGML_OP_TRANSPOSE;
    }

    void attend(const ggml_tensor * node) {
        if (!has_bf16()) {
            float_attention.compute(node, products.n_threads);
            return;
        }
        const auto source = [this](const ggml_tensor * tensor) {
            return std::find(skipped.begin(), skipped.end(), tensor) == skipped.end() ? tensor : tensor->src[0];
        };
        bf16_attention.compute(node, source(node->src[1]), source(node->src[2]), products.n_threads);
        skipped.clear();
    }

    Products & products;
    FloatAttention & float_attention;
    Bf16Attention & bf16_attention;
    ggml_cgraph * graph;
    std::vector<const ggml_tensor *> skipped;  // copies that the next attention does not need
};

struct Context {
    Products products;
    FloatAttention float_attention;
    Bf16Attention bf16_attention;
};

enum ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) {
    auto & [products, float_attention, bf16_attention] = *(Context *) backend->context;
    try {
        Run(products, float_attention, bf16_attention, graph).compute();
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
            return takes_bias(op) || takes_residual(op) || takes_norm_bias(op);
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM:
            return takes_norm(op);
        case GGML_OP_MUL:
            return takes_norm_weight(op);
        case GGML_OP_CPY:
            return takes_copy(op);
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
    return has_isa(dnnl::cpu_isa::avx2_vnni) || has_isa(dnnl::cpu_isa::avx512_core_vnni);
}

// Whether it multiplies bfloat16.
EXPORT bool rerank_accel_has_bf16() { return has_bf16(); }

EXPORT size_t rerank_accel_copied_bytes() { return copied_bytes; }

// For the contexts that this thread makes from now on. use: whether they multiply here at all. bf16: in bfloat16, which is
// nearly as exact as float32, where the CPU can; else in int8. give_back_pages: of the mapped file.
EXPORT void rerank_accel_configure(bool use, bool bf16, bool give_back_pages) { options = {use, bf16, give_back_pages}; }

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
        Epilogue epilogue;
        epilogue.bias = bias;
        epilogue.has_gelu = gelu;
        products.multiply(&matrix, in, rows, epilogue, out);
        return true;
    } catch (const std::exception & error) {
        GGML_LOG_ERROR("%s: %s\n", __func__, error.what());
        return false;
    }
}
