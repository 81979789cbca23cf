// Counts the instructions that a program executes in QEMU, into a file that can be read meanwhile.
//
// The file (option `count=`) holds one 64-bit number. QEMU translates code in blocks; each adds its
// number of instructions when it begins. Only what is used of QEMU's plugin interface is declared
// here, so that no header of QEMU is needed.

#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };

typedef void (*translated_t)(qemu_plugin_id_t id, struct qemu_plugin_tb *block);
typedef void (*executed_t)(unsigned int processor, void *data);

extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, translated_t callback);
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *block, executed_t callback,
                                                 enum qemu_plugin_cb_flags flags, void *data);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);

#define EXPORT __attribute__((visibility("default")))

#ifndef INTERFACE
#define INTERFACE 1
#endif
EXPORT int qemu_plugin_version = INTERFACE;

static uint64_t *counter;

static void executed(unsigned int processor, void *data)
{
    (void)processor;
    // Threads add at the same time.
    __atomic_fetch_add(counter, (uint64_t)(uintptr_t)data, __ATOMIC_RELAXED);
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *block)
{
    (void)id;
    void *count = (void *)(uintptr_t)qemu_plugin_tb_n_insns(block);
    qemu_plugin_register_vcpu_tb_exec_cb(block, executed, QEMU_PLUGIN_CB_NO_REGS, count);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc, char **argv)
{
    (void)info;
    for (int i = 0; i < argc; i++) {
        if (strncmp(argv[i], "count=", 6) != 0)
            continue;
        int file = open(argv[i] + 6, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (file < 0 || ftruncate(file, sizeof *counter) != 0)
            return -1;
        void *mapped = mmap(NULL, sizeof *counter, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        close(file);
        if (mapped == MAP_FAILED)
            return -1;
        counter = mapped;
        qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
        return 0;
    }
    return -1;
}
