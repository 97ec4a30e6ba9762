#include "onednn.h"

#include <dlfcn.h>

#include <string>
#include <unordered_map>

// What is used of oneDNN's C interface (version 3), written down here because MindSpore ships the library without headers.
// https://uxlfoundation.github.io/oneDNN/group_dnnl_api.html
namespace {

using dims_t = int64_t[12];
using handle = void *;
struct exec_arg {
  int arg;
  handle memory;
};
struct version_t {
  int major, minor, patch;
};

constexpr int kCpu = 1, kBf16 = 2, kF32 = 3, kDefaultStream = 1;
constexpr int kSrc = 1, kWeights = 33, kDst = 17;
constexpr int kAvx512Bf16 = 0xe7;  // bits of avx512_core_bf16 in dnnl_cpu_isa_t

struct Library {
  handle engine = nullptr;
  bool ready = false, bf16 = false;
  std::string text;

  int (*engine_create)(handle *, int, size_t);
  int (*stream_create)(handle *, handle, unsigned);
  int (*stream_wait)(handle);
  int (*desc_create)(handle *, int, const int64_t *, int, const int64_t *);
  int (*desc_destroy)(handle);
  int (*matmul_create)(handle *, handle, handle, handle, handle, handle, handle);
  int (*attr_create)(handle *);
  int (*attr_destroy)(handle);
  int (*attr_set_post_ops)(handle, handle);
  int (*post_ops_create)(handle *);
  int (*post_ops_destroy)(handle);
  int (*post_ops_append_sum)(handle, float, int32_t, int);
  int (*primitive_create)(handle *, handle);
  int (*primitive_desc_destroy)(handle);
  int (*primitive_execute)(handle, handle, int, const exec_arg *);
  int (*memory_create)(handle *, handle, handle, void *);
  int (*memory_set)(handle, void *);
  int (*concurrency)(int);

  Library() {
    // MindSpore has loaded its own long before; a second copy, or another's, is not asked for.
    void *lib = dlopen("libdnnl.so.3", RTLD_NOW | RTLD_NOLOAD);
    if (!lib) {
      const bool older = dlopen("libdnnl.so.2", RTLD_NOW | RTLD_NOLOAD) != nullptr;
      text = older ? "oneDNN 2 is not used" : "no oneDNN in the process";
      return;
    }
    const version_t *(*version)() = nullptr;
    int (*isa)() = nullptr;
    bool all = true;
    auto find = [&](auto &f, const char *name) {
      f = reinterpret_cast<std::remove_reference_t<decltype(f)>>(dlsym(lib, name));
      all = all && f;
    };
    find(version, "dnnl_version");
    find(isa, "dnnl_get_effective_cpu_isa");
    find(engine_create, "dnnl_engine_create");
    find(stream_create, "dnnl_stream_create");
    find(stream_wait, "dnnl_stream_wait");
    find(desc_create, "dnnl_memory_desc_create_with_strides");
    find(desc_destroy, "dnnl_memory_desc_destroy");
    find(matmul_create, "dnnl_matmul_primitive_desc_create");
    find(attr_create, "dnnl_primitive_attr_create");
    find(attr_destroy, "dnnl_primitive_attr_destroy");
    find(attr_set_post_ops, "dnnl_primitive_attr_set_post_ops");
    find(post_ops_create, "dnnl_post_ops_create");
    find(post_ops_destroy, "dnnl_post_ops_destroy");
    find(post_ops_append_sum, "dnnl_post_ops_append_sum");
    find(primitive_create, "dnnl_primitive_create");
    find(primitive_desc_destroy, "dnnl_primitive_desc_destroy");
    find(primitive_execute, "dnnl_primitive_execute");
    find(memory_create, "dnnl_memory_create");
    find(memory_set, "dnnl_memory_set_data_handle");
    if (!all || version()->major != 3) {
      text = "a oneDNN that is not version 3";
      return;
    }
    find(concurrency, "dnnl_threadpool_interop_set_max_concurrency");  // only where a pool is its runtime
    if (!concurrency || engine_create(&engine, kCpu, 0) != 0) {
      text = "a oneDNN with another threading runtime than MindSpore's";
      return;
    }
    ready = true;
    bf16 = (isa() & kAvx512Bf16) == kAvx512Bf16;
    text = "oneDNN " + std::to_string(version()->major) + "." + std::to_string(version()->minor) + "." +
           std::to_string(version()->patch);
  }
};

const Library &library() {
  static const Library *lib = new Library();  // never destroyed: worker threads may outlive static destructors
  return *lib;
}

struct Key {
  int64_t m, n, k, lda, ldb, ldc, type, transposed, accumulate;  // of one size: nothing lies between them
  bool operator==(const Key &o) const { return std::memcmp(this, &o, sizeof o) == 0; }
};
struct Hash {
  size_t operator()(const Key &key) const {
    uint64_t h = 1469598103934665603ull;
    for (int64_t x : {key.m, key.n, key.k, key.lda, key.ldb, key.ldc,
                      key.type | key.transposed << 4 | key.accumulate << 5})
      h = (h ^ uint64_t(x)) * 1099511628211ull;
    return h ^ h >> 29;
  }
};

struct Product {
  handle primitive = nullptr, a = nullptr, b = nullptr, c = nullptr;
};

// A primitive and its memory objects belong to one thread: what oneDNN scratches in is shared by a primitive's runs.
struct Thread {
  handle stream = nullptr;
  std::unordered_map<Key, Product, Hash> products;
};
Thread &thread() {
  thread_local Thread *mine = new Thread();  // not destroyed with the thread, see library()
  return *mine;
}

bool create(const Library &lib, const Key &key, Product &product) {
  const dims_t a_dims = {key.m, key.k}, b_dims = {key.k, key.n}, c_dims = {key.m, key.n};
  const dims_t a_strides = {key.lda, 1}, c_strides = {key.ldc, 1};
  const dims_t b_strides = {key.transposed ? 1 : key.ldb, key.transposed ? key.ldb : 1};
  handle a = nullptr, b = nullptr, c = nullptr, attr = nullptr, ops = nullptr, desc = nullptr;
  bool ok = lib.desc_create(&a, 2, a_dims, key.type, a_strides) == 0 &&
            lib.desc_create(&b, 2, b_dims, key.type, b_strides) == 0 &&
            lib.desc_create(&c, 2, c_dims, kF32, c_strides) == 0;
  if (ok && key.accumulate)
    ok = lib.post_ops_create(&ops) == 0 && lib.post_ops_append_sum(ops, 1.f, 0, 0) == 0 &&
         lib.attr_create(&attr) == 0 && lib.attr_set_post_ops(attr, ops) == 0;
  ok = ok && lib.matmul_create(&desc, lib.engine, a, b, nullptr, c, attr) == 0 &&
       lib.primitive_create(&product.primitive, desc) == 0 &&
       lib.memory_create(&product.a, a, lib.engine, nullptr) == 0 &&
       lib.memory_create(&product.b, b, lib.engine, nullptr) == 0 &&
       lib.memory_create(&product.c, c, lib.engine, nullptr) == 0;
  for (handle d : {a, b, c})
    if (d) lib.desc_destroy(d);
  if (attr) lib.attr_destroy(attr);
  if (ops) lib.post_ops_destroy(ops);
  if (desc) lib.primitive_desc_destroy(desc);
  return ok;
}

bool run(const Key &key, const void *a, const void *b, void *c) {
  const Library &lib = library();
  if (!lib.ready) return false;
  Thread &mine = thread();
  if (!mine.stream) {
    lib.concurrency(1);  // of this thread: primitives are made for one
    if (lib.stream_create(&mine.stream, lib.engine, kDefaultStream) != 0) return false;
  }
  auto found = mine.products.find(key);
  if (found == mine.products.end()) {
    Product made;
    if (!create(lib, key, made)) return false;
    found = mine.products.emplace(key, made).first;
  }
  const Product &p = found->second;
  lib.memory_set(p.a, const_cast<void *>(a));
  lib.memory_set(p.b, const_cast<void *>(b));
  lib.memory_set(p.c, c);
  const exec_arg args[] = {{kSrc, p.a}, {kWeights, p.b}, {kDst, p.c}};
  return lib.primitive_execute(p.primitive, mine.stream, 3, args) == 0 && lib.stream_wait(mine.stream) == 0;
}

}  // namespace

namespace kimi::onednn {

bool available() { return library().ready; }
bool has_bf16() { return library().ready && library().bf16; }
const char *description() { return library().text.c_str(); }

bool matmul(int64_t m, int64_t n, int64_t k, const bf16 *a, int64_t lda, const bf16 *b, int64_t ldb, bool transposed,
            float *c, int64_t ldc, bool accumulate) {
  return run({m, n, k, lda, ldb, ldc, kBf16, transposed, accumulate}, a, b, c);
}
bool matmul(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, bool transposed,
            float *c, int64_t ldc, bool accumulate) {
  return run({m, n, k, lda, ldb, ldc, kF32, transposed, accumulate}, a, b, c);
}

}  // namespace kimi::onednn
